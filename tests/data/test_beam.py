"""Data sets that Apache Beam prepares, on this machine; a part needs the extra ``beam``."""

import bz2
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tensorflow_datasets as tfds

from jaxlm.data.prepare import PrepareConfig, TokenizerConfig, prepare
from jaxlm.data.tfds import Tfds
from jaxlm.errors import InputError


class BeamPoems(tfds.core.BeamBasedBuilder):
    """Lines of local files; an environment variable names their folder."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = tfds.features.FeaturesDict({"text": tfds.features.Text()})
        return tfds.core.DatasetInfo(builder=self, description="", features=features)

    def _split_generators(self, dl_manager):
        files = sorted(map(str, Path(os.environ["POEMS"]).glob("*.txt")))
        return {"train": self._generate_examples(files)}

    def _generate_examples(self, files):
        beam = tfds.core.lazy_imports.apache_beam

        def lines(file):
            for number, line in enumerate(Path(file).read_text().splitlines()):
                yield f"{Path(file).name}:{number}", {"text": line}

        return beam.Create(files) | beam.FlatMap(lines)


@pytest.fixture
def data_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("jaxlm.data.tfds._online", lambda: True)
    (tmp_path / "poems").mkdir()
    monkeypatch.setenv("POEMS", str(tmp_path / "poems"))
    for number in range(3):
        text = "".join(f"poem {number} line {i}\n" for i in range(40))
        (tmp_path / "poems" / f"{number}.txt").write_text(text)
    return tmp_path


@pytest.fixture
def beam() -> None:
    if subprocess.run([sys.executable, "-c", "import apache_beam"], capture_output=True).returncode:
        pytest.skip("Apache Beam is not installed")


@pytest.mark.usefixtures("beam")
@pytest.mark.parametrize("options", [(), ("runner=DirectRunner", "--direct_num_workers=1")])
def test_a_beam_data_set_is_prepared_and_becomes_rows(data_dir, options):
    source = Tfds(name="beam_poems", data_dir=str(data_dir), beam=options)
    config = PrepareConfig(source=source, tokenizer=TokenizerConfig(vocab_size=60), row_length=16)
    info = prepare(config, data_dir / "out")
    assert sum(info.documents.values()) == 120
    assert sorted(source.documents()) == sorted(
        f"poem {number} line {i}" for number in range(3) for i in range(40)
    )
    assert "tensorflow" not in sys.modules


PAGE = """<page><title>{title}</title><ns>0</ns><id>{id}</id><revision><id>1</id>
<timestamp>2023-06-01T00:00:00Z</timestamp><model>wikitext</model><format>text/x-wiki</format>
<text bytes="9" xml:space="preserve">{text}</text></revision></page>"""


@pytest.mark.usefixtures("beam")
def test_the_stock_wikipedia_is_prepared_from_its_dumps(data_dir, monkeypatch):
    """All of its own pipeline; the two files that it downloads are ours."""
    pytest.importorskip("mwxml")
    pytest.importorskip("mwparserfromhell")
    pages = [
        PAGE.format(title=f"Page_{i}", id=i, text=f"'''Bold {i}''' and [[Link|linked]].")
        for i in range(1, 4)
    ]
    pages.append(PAGE.format(title="R", id=9, text="#REDIRECT [[Page_1]]"))
    start = '<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.10/" version="0.10">'
    site = "<siteinfo><sitename>W</sitename><dbname>w</dbname></siteinfo>"
    dump = data_dir / "dump.xml.bz2"
    dump.write_bytes(bz2.compress(f"{start}{site}{''.join(pages)}</mediawiki>".encode()))
    files = {"articles.xml.bz2": {"size": 1}}
    status = {"jobs": {"articlesmultistreamdump": {"status": "done", "files": files}}}
    (data_dir / "status.json").write_text(json.dumps(status))
    manager = "tensorflow_datasets.core.download.DownloadManager"
    info = {"info": data_dir / "status.json"}
    monkeypatch.setattr(f"{manager}.download_and_extract", lambda self, _: info)
    monkeypatch.setattr(f"{manager}.download", lambda self, _: {"xml": [str(dump)]})
    source = Tfds(name="wikipedia/20230601.simple", data_dir=str(data_dir))
    assert sorted(source.documents()) == [f"Bold {i} and linked." for i in range(1, 4)]
    assert "tensorflow" not in sys.modules


@pytest.mark.usefixtures("beam")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("runer=DataflowRunner",), "DirectRunner knows no option 'runer'"),
        (("direct_num_workers=many",), "direct_num_workers: invalid int value: 'many'"),
    ],
)
def test_options_that_beam_does_not_know(data_dir, options, message):
    source = Tfds(name="beam_poems", data_dir=str(data_dir), beam=options)
    with pytest.raises(InputError, match=message) as error:
        list(source.documents())
    assert "\n" not in str(error.value)


def test_without_beam_it_says_what_to_install(data_dir, monkeypatch):
    monkeypatch.setitem(sys.modules, "apache_beam", None)
    monkeypatch.setitem(sys.modules, "apache_beam.options.pipeline_options", None)
    with pytest.raises(InputError, match=r"beam_poems is prepared .* pip install 'jaxlm\[beam\]'"):
        list(Tfds(name="beam_poems", data_dir=str(data_dir)).documents())
