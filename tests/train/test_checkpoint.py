import errno
import math
import os
import resource
import shutil
import time
from dataclasses import replace
from pathlib import Path

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from golden import make_checkpoint_golden
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxlm.errors import InputError
from jaxlm.train import checkpoint, restore
from jaxlm.train.checkpoint import Checkpointer
from jaxlm.train.restore import (
    Monitor,
    best_step,
    chosen_steps,
    list_steps,
    restore_mean,
    restore_part,
)

GOLDEN = Path(__file__).parents[1] / "golden"
ACCURACY = Monitor("accuracy", higher_is_better=True, first_step=1)


@flax.struct.dataclass
class State:
    step: jax.Array
    trainable: dict
    frozen: dict
    opt_state: tuple


def make_state(seed=0, *, hidden_dim=64, shape=(4, 2), spec=("b",), frozen=()):
    key = jax.random.key(seed)
    params = {
        "up": {"kernel": jax.random.normal(key, (hidden_dim, 32)), "bias": jnp.ones(32)},
        "head": {"kernel": jnp.ones((32, 8), jnp.bfloat16)},
    }
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    trainable = {"params": params}
    state = State(jnp.int32(seed), trainable, dict(frozen), optimizer.init(trainable))
    mesh = jax.make_mesh(shape, ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    return jax.tree.map(
        lambda x: jax.device_put(x, NamedSharding(mesh, P(*spec) if x.ndim == 2 else P())), state
    )


def abstract(state):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    assert all(
        x.dtype == y.dtype and np.array_equal(np.asarray(x), np.asarray(y))
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


def save_all(directory, saves, **options):
    """``saves``: {step: loss or None}; the state of a step is ``make_state(step)``."""
    with Checkpointer(directory, **options) as checkpointer:
        for step, loss in saves.items():
            metrics = None if loss is None else {"loss": loss}
            checkpointer.save(step, make_state(step), {"examples_seen": 8 * step}, metrics)


def array_files(step_directory):
    return [path for path in (step_directory / "state").rglob("d/*") if path.is_file()]


@pytest.mark.parametrize("frozen", [{}, {"params": {"table": jnp.ones((8, 8), jnp.int8)}}])
def test_restores_on_another_mesh(tmp_path, frozen):
    state = make_state(3, frozen=frozen)
    with Checkpointer(tmp_path / "run") as checkpointer:
        checkpointer.save(3, state, {"examples_seen": 24, "part": [1, 2.5]}, {"loss": 1.5})
    elsewhere = make_state(shape=(1, 8), spec=(None, "b"), frozen=frozen)
    with Checkpointer(tmp_path / "run") as checkpointer:
        restored = checkpointer.restore(abstract(elsewhere))
    assert (restored.step, restored.refused) == (3, [])
    assert restored.cursor == {"examples_seen": 24, "part": [1, 2.5]}
    assert restored.metrics == {"loss": 1.5}
    assert_same(restored.state, state)
    kernel = restored.state.trainable["params"]["up"]["kernel"]
    assert kernel.sharding == elsewhere.trainable["params"]["up"]["kernel"].sharding


@pytest.mark.parametrize("archive", sorted(GOLDEN.glob("checkpoint_jax_*.zip")), ids=str)
def test_what_another_jax_wrote_is_read(tmp_path, archive):
    shutil.unpack_archive(archive, tmp_path)
    state = make_checkpoint_golden.make_state()
    with Checkpointer(tmp_path) as checkpointer:
        restored = checkpointer.restore(abstract(state))
    assert (restored.step, restored.refused) == (20, [])
    assert (restored.cursor, restored.metrics) == ({"examples_seen": 160}, {"loss": 1.5})
    assert_same(restored.state, state)


def test_the_first_save_of_a_run_is_read_back(tmp_path, monkeypatch):
    """A disk that loses what it was given is found out before the training, not after it."""
    wait = checkpoint._Manager.wait_until_finished

    def wait_and_lose(manager):
        wait(manager)
        for path in tmp_path.rglob("state/**/d/*"):
            os.truncate(path, path.stat().st_size // 2)

    monkeypatch.setattr(checkpoint._Manager, "wait_until_finished", wait_and_lose)
    with (
        pytest.raises(InputError, match=r"first checkpoint, .*/7, .* cannot be read back"),
        Checkpointer(tmp_path) as checkpointer,
    ):
        checkpointer.save(7, make_state(7), {})


def test_later_saves_are_not_waited_for(tmp_path, monkeypatch):
    read = []
    monkeypatch.setattr(restore, "check_readable", lambda step, *_: read.append(step.name))
    save_all(tmp_path, {1: 3.0, 2: 2.0})
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.restore(abstract(make_state()))
        checkpointer.save(3, make_state(3), {})
    assert read == ["1"]


def test_the_state_may_be_donated_at_once(tmp_path):
    state = make_state(1)
    expected = jax.tree.map(np.asarray, state)
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, state, {})
        step = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
        jax.block_until_ready(step(state))
        assert_same(checkpointer.restore(abstract(make_state())).state, expected)


def test_keeps_the_newest_and_the_best(tmp_path):
    save_all(tmp_path, {10: 3.0, 20: 2.0, 30: 5.0})
    # After a restart the best is still known; a step without metrics, or with NaN, is never best.
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.restore(abstract(make_state()))
    save_all(tmp_path, {40: 9.0, 50: None, 60: float("nan")})
    assert list_steps(tmp_path) == [20, 50, 60]
    assert best_step(tmp_path) == 20
    assert best_step(tmp_path, Monitor("accuracy")) is None
    save_all(tmp_path, {70: 1.0, 80: None, 90: None}, monitor=Monitor("none"), keep=1)
    assert list_steps(tmp_path) == [90]


@pytest.mark.parametrize("basis", ["data", "evaluation"])
def test_metrics_on_other_data_do_not_compare(tmp_path, basis):
    """A run that goes on with other data is best by these, whatever it reached on the first.

    So is one that is evaluated otherwise.
    """
    same = {"data": ["same"], "evaluation": "same"}
    save = lambda checkpointer, step, value, **metrics: checkpointer.save(
        step, make_state(step), {"examples_seen": 8 * step} | same | {basis: value}, metrics
    )
    with Checkpointer(tmp_path, keep=1) as checkpointer:
        save(checkpointer, 10, "first", loss=1.0)
        save(checkpointer, 20, "first", loss=1.5)
    assert best_step(tmp_path) == 10
    with Checkpointer(tmp_path, keep=1) as checkpointer:
        checkpointer.restore(abstract(make_state()))
        save(checkpointer, 30, "second")
    assert chosen_steps(tmp_path, Monitor(), None) == []  # so the newest is read
    with Checkpointer(tmp_path, keep=1) as checkpointer:
        checkpointer.restore(abstract(make_state()))
        save(checkpointer, 40, "second", loss=2.0)
        save(checkpointer, 50, "second", loss=3.0)
        save(checkpointer, 60, "second", loss=3.5)
    assert list_steps(tmp_path) == [40, 60]
    assert best_step(tmp_path) == 40
    with Checkpointer(tmp_path, keep=1) as checkpointer:  # and where it is resumed once more
        checkpointer.restore(abstract(make_state()))
        save(checkpointer, 70, "second", loss=4.0)
    assert list_steps(tmp_path) == [40, 70]


def test_metrics_of_older_versions_compare(tmp_path):
    """Which did not save how they were measured."""
    save = lambda checkpointer, step, cursor, loss: checkpointer.save(
        step, make_state(step), {"examples_seen": 8 * step, "data": ["a"]} | cursor, {"loss": loss}
    )
    with Checkpointer(tmp_path, keep=1) as checkpointer:
        save(checkpointer, 10, {}, 1.0)
    with Checkpointer(tmp_path, keep=1) as checkpointer:
        checkpointer.restore(abstract(make_state()))
        save(checkpointer, 20, {"evaluation": "x"}, 2.0)
        save(checkpointer, 30, {"evaluation": "x"}, 3.0)
    assert (list_steps(tmp_path), best_step(tmp_path)) == ([10, 30], 10)


def test_the_best_is_looked_for_back_to_a_step_that_does_not_compare(tmp_path):
    """One that says nothing compares with both its neighbours, and they with each other or not."""
    for name, cursors, best in (
        ("unknown first", [{}, {"evaluation": "x"}, {"evaluation": "y"}], 30),
        ("unknown between", [{"evaluation": "x"}, {}, {"evaluation": "y"}], 20),
        ("known alike", [{"evaluation": "x"}, {}, {"evaluation": "x"}], 10),
    ):
        with Checkpointer(tmp_path / name, keep=3) as checkpointer:
            for step, cursor in zip((10, 20, 30), cursors, strict=True):
                checkpointer.save(step, make_state(), cursor, {"loss": float(step)})
        assert best_step(tmp_path / name) == best, name


def test_keeps_those_whose_mean_is_a_model(tmp_path):
    saves = {0: 9.0, 10: 1.0, 20: 3.0, 25: None, 30: float("nan"), 40: 2.0, 50: 4.0, 55: None}
    save_all(tmp_path, saves, average=3, keep=1)
    # The newest, the best, and the newest three that were evaluated.
    assert list_steps(tmp_path) == [10, 20, 40, 50, 55]
    assert chosen_steps(tmp_path, Monitor(), 3) == [20, 40, 50]
    assert chosen_steps(tmp_path, Monitor(), 9) == [10, 20, 40, 50]
    assert chosen_steps(tmp_path, Monitor(), None) == [10]
    assert chosen_steps(tmp_path, Monitor("accuracy"), 3) == []


def test_the_state_before_training_is_in_no_mean(tmp_path):
    save_all(tmp_path, {0: 9.0}, average=3)
    assert chosen_steps(tmp_path, Monitor(), 3) == [0]  # there is no other
    save_all(tmp_path, {10: 2.0, 20: 1.0}, average=3)
    assert list_steps(tmp_path) == [0, 10, 20]
    assert chosen_steps(tmp_path, Monitor(), 3) == [10, 20]


def test_the_mean_of_several_steps(tmp_path):
    save_all(tmp_path, {10: 2.0, 20: 1.0, 30: 3.0}, keep=3)
    target = {"trainable": abstract(make_state()).trainable}
    restored = restore_mean(tmp_path, target, [10, 20, 30])
    assert (restored.step, restored.cursor) == (30, {"examples_seen": 240})
    states = [make_state(step).trainable for step in (10, 20, 30)]
    mean = jax.tree.map(lambda *leaves: np.mean(np.float64(leaves), 0), *states)
    for found, expected, old in zip(
        *map(jax.tree.leaves, (restored.state["trainable"], mean, states[0])), strict=True
    ):
        assert (found.dtype, found.sharding) == (old.dtype, old.sharding)
        np.testing.assert_allclose(np.float64(found), expected, rtol=1e-6, atol=1e-6)
    for steps, step in (([20], 20), ([], 30)):
        restored = restore_mean(tmp_path, target, steps)
        assert restored.step == step
        assert_same(restored.state["trainable"], make_state(step).trainable)


@pytest.mark.parametrize("name", ["try[1]", "[2024] thesis/run", "a*b?", "back\\slash", "é ü [é]"])
def test_a_path_is_no_pattern(tmp_path, name):
    directory = tmp_path / name / "checkpoints"
    state = make_state(4)
    with Checkpointer(directory) as checkpointer:
        checkpointer.save(3, make_state(3), {"examples_seen": 24}, {"loss": 1.0})
        checkpointer.save(4, state, {"examples_seen": 32}, {"loss": 2.0})
    with Checkpointer(directory) as checkpointer:
        restored = checkpointer.restore(abstract(state))
    assert (restored.step, restored.refused) == (4, [])
    assert_same(restored.state, state)
    target = {"trainable": abstract(state).trainable}
    assert restore_part(directory, target, best_step(directory)).step == 3


@pytest.mark.parametrize(
    ("monitor", "evaluations", "best"),
    [
        # An untrained head says the frequent class, and so does a trained one: 95 % are right.
        (ACCURACY, {0: (0.95, 0.7), 10: (0.95, 0.3), 20: (0.95, 0.2), 30: (0.94, 0.1)}, 20),
        (ACCURACY, {0: (0.99, 0.1), 10: (0.95, 0.3)}, 10),
        (ACCURACY, {0: (0.5, 0.7)}, 0),
        # Of an encoder without a new head, step 0 is a model like any other.
        (replace(ACCURACY, first_step=0), {0: (0.99, 0.1), 10: (0.95, 0.3)}, 0),
        # Constant predictions have no correlation: the loss decides among them, and not above one.
        (ACCURACY, {0: (math.nan, 9.0), 10: (math.nan, 5.0), 20: (math.nan, 4.0)}, 20),
        (ACCURACY, {10: (math.nan, 1.0), 20: (0.1, 4.0)}, 20),
    ],
)
def test_ties_go_to_the_lower_loss_and_an_untrained_head_comes_last(
    tmp_path, monitor, evaluations, best
):
    with Checkpointer(tmp_path, keep=1, monitor=monitor) as checkpointer:
        for step, (accuracy, loss) in evaluations.items():
            metrics = {"accuracy": accuracy, "loss": loss}
            checkpointer.save(step, make_state(step), {"examples_seen": step}, metrics)
    assert best_step(tmp_path, monitor) == best
    assert set(list_steps(tmp_path)) == {best, max(evaluations)}


def test_a_run_that_goes_on_may_be_preempted_again(tmp_path, monkeypatch):
    save_all(tmp_path, {1: 0.5})
    # What JAX's preemption service says of a step in a run of several processes.
    monkeypatch.setattr("orbax.checkpoint.utils.reached_preemption", lambda step: True)
    save_all(tmp_path, {2: 0.4})
    assert list_steps(tmp_path) == [1, 2]


def test_keeping_nothing_is_refused(tmp_path):
    with pytest.raises(InputError, match="keep=0"):
        Checkpointer(tmp_path, keep=0)


def truncate(step):
    for path in array_files(step):
        path.write_bytes(path.read_bytes()[:100])


def delete_data(step):
    for path in array_files(step):
        path.unlink()


def delete_state(step):
    shutil.rmtree(step / "state")


def break_metadata(step):
    (step / "meta" / "metadata").write_text("{")


def empty_metadata(step):
    (step / "meta" / "metadata").write_text("{}")


def change_cursor(step):
    path = step / "meta" / "metadata"
    path.write_text(path.read_text().replace('"examples_seen": 160', '"examples_seen": 161'))


def break_orbax_metadata(step):
    (step / "state" / "_METADATA").write_text("{")


DAMAGES = [
    truncate,
    delete_data,
    delete_state,
    break_metadata,
    empty_metadata,
    change_cursor,
    break_orbax_metadata,
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_step_gives_way_to_the_one_before(tmp_path, damage, capfd):
    save_all(tmp_path, {10: 2.0, 20: 1.0})
    damage(tmp_path / "20")
    reports = []
    with Checkpointer(tmp_path, report=reports.append) as checkpointer:
        restored = checkpointer.restore(abstract(make_state()))
        assert restored.step == 10
        assert restored.cursor == {"examples_seen": 80}
        assert_same(restored.state, make_state(10))
        assert restored.refused == reports
        assert reports[0].startswith("the checkpoint of step 20 is damaged: ")
        assert len(reports) == 1
        assert "\n" not in reports[0]
        with pytest.raises(InputError, match="step 20 is damaged"):
            checkpointer.restore(abstract(make_state()), 20)
        # The run continues, and the damaged step is out of its way.
        checkpointer.save(15, make_state(15), {})
        assert checkpointer.restore(abstract(make_state())).step == 15
        assert checkpointer.steps() == [10, 15]
    assert "Traceback" not in "".join(capfd.readouterr())


def test_flipped_bytes_that_orbax_accepts_are_found(tmp_path, monkeypatch):
    """Rewritten by Orbax itself, so that nothing but the checksum can know."""
    save_all(tmp_path / "one", {10: 2.0, 20: 1.0})
    state = make_state(20)
    params = state.trainable["params"]
    params["up"]["kernel"] = params["up"]["kernel"].at[5, 7].multiply(-1)
    with Checkpointer(tmp_path / "two") as checkpointer:
        checkpointer.save(20, state, {})
    shutil.rmtree(tmp_path / "one" / "20" / "state")
    shutil.move(tmp_path / "two" / "20" / "state", tmp_path / "one" / "20" / "state")
    reports = []
    part = {"trainable": abstract(make_state()).trainable}
    restored = restore_part(tmp_path / "one", part, report=reports.append)
    assert restored.step == 10
    assert "trainable/params/up/kernel has the checksum" in reports[0]
    # Control: without the comparison the wrong values come back without a word.
    monkeypatch.setattr("jaxlm.train.restore.checksums", lambda state: {})
    assert restore_part(tmp_path / "one", part).step == 20


def test_flipped_bytes_in_the_files_are_found(tmp_path):
    save_all(tmp_path, {10: 2.0, 20: 1.0})
    for path in array_files(tmp_path / "20"):
        content = bytearray(path.read_bytes())
        for place in range(len(content) // 4, len(content), 97):
            content[place] ^= 0x40
        path.write_bytes(content)
    with Checkpointer(tmp_path, report=lambda _: None) as checkpointer:
        assert checkpointer.restore(abstract(make_state())).step == 10


def test_all_damaged_or_none_there_is_one_sentence(tmp_path):
    with pytest.raises(InputError, match=r"holds no checkpoint$"):
        restore_part(tmp_path / "nowhere", {})
    save_all(tmp_path, {10: 2.0, 20: 1.0})
    with pytest.raises(InputError, match="no checkpoint of step 15, only of 10, 20"):
        restore_part(tmp_path, {}, 15)
    for step in ("10", "20"):
        truncate(tmp_path / step)
    with (
        Checkpointer(tmp_path, report=lambda _: None) as checkpointer,
        pytest.raises(InputError, match="can be used: the checkpoint of step 20 is damaged"),
    ):
        checkpointer.restore(abstract(make_state()))


def test_another_configuration_is_named_and_never_called_damaged(tmp_path):
    save_all(tmp_path, {10: 2.0, 20: 1.0})
    reports = []
    with Checkpointer(tmp_path, report=reports.append) as checkpointer:
        with pytest.raises(InputError, match=r"kernel is float32\[64, 32\] there and float32\[48,"):
            checkpointer.restore(abstract(make_state(hidden_dim=48)))
        extra = make_state()
        extra.trainable["params"]["extra"] = jnp.ones(3)
        with pytest.raises(InputError, match=r"extra is absent there and float32\[3\] here"):
            checkpointer.restore(abstract(extra))
        fewer = make_state()
        del fewer.trainable["params"]["up"]
        with pytest.raises(InputError, match=r"trainable/params/up/bias is float32\[32\] there"):
            checkpointer.restore(abstract(fewer))
    assert reports == []


def test_a_part_is_cast_and_placed_anew(tmp_path):
    save_all(tmp_path, {10: 1.0, 20: 2.0})
    up = abstract(make_state(shape=(8, 1), spec=("a",)).trainable["params"]["up"])
    up = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16, sharding=x.sharding), up
    )
    target = {"trainable": {"params": {"up": up}}}
    restored = restore_part(tmp_path, target, best_step(tmp_path))
    kernel = restored.state["trainable"]["params"]["up"]["kernel"]
    expected = make_state(10).trainable["params"]["up"]["kernel"].astype(jnp.bfloat16)
    assert restored.step == 10
    assert kernel.sharding == up["kernel"].sharding
    assert_same(kernel, expected)


def test_saving_a_step_again(tmp_path):
    save_all(tmp_path, {10: 2.0, 20: 1.0, 30: 3.0}, keep=3)
    with Checkpointer(tmp_path, keep=3) as checkpointer:
        checkpointer.restore(abstract(make_state()), 10)
        checkpointer.save(20, make_state(77), {})  # another history: the former 20 and 30 go
        assert checkpointer.restore(abstract(make_state())).step == 20
        assert_same(checkpointer.restore(abstract(make_state())).state, make_state(77))
        checkpointer.save(20, make_state(78), {})  # this run's own: left as it is
        assert_same(checkpointer.restore(abstract(make_state())).state, make_state(77))
    assert list_steps(tmp_path) == [10, 20]


def test_metrics_that_come_later_than_their_step(tmp_path):
    save_all(tmp_path, {10: 1.0, 20: None})  # stopped just before an evaluation
    with Checkpointer(tmp_path) as checkpointer:
        state = checkpointer.restore(abstract(make_state())).state
        checkpointer.save(20, state, {"examples_seen": 160, "evals_done": 2}, {"loss": 0.5})
        checkpointer.save(20, state, {}, {"loss": 9.0})  # it has its metrics
    assert best_step(tmp_path) == 20
    with Checkpointer(tmp_path) as checkpointer:
        restored = checkpointer.restore(abstract(make_state()))
    assert (restored.step, restored.metrics) == (20, {"loss": 0.5})
    assert restored.cursor == {"examples_seen": 160, "evals_done": 2}
    assert_same(restored.state, make_state(20))


@pytest.mark.parametrize(
    "failing", ["jaxlm.train.restore._read_meta", "jaxlm.train.restore._read_arrays"]
)
def test_a_disk_that_fails_is_no_damage(tmp_path, monkeypatch, failing):
    save_all(tmp_path, {10: 2.0, 20: 1.0})
    stale = OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    def fail(*_):
        raise stale

    with monkeypatch.context() as patch:
        patch.setattr(failing, fail)
        with pytest.raises(InputError, match=r"/20 cannot be read now \(Stale file handle\)"):
            restore_part(tmp_path, {"trainable": abstract(make_state()).trainable})
    with Checkpointer(tmp_path) as checkpointer:
        assert checkpointer.restore(abstract(make_state())).step == 20


def test_half_written_steps_are_ignored_and_removed(tmp_path):
    save_all(tmp_path, {10: 2.0})
    stale = tmp_path / "20.orbax-checkpoint-tmp" / "state"
    stale.mkdir(parents=True)
    assert list_steps(tmp_path) == [10]
    with Checkpointer(tmp_path) as checkpointer:
        assert not stale.exists()
        assert checkpointer.restore(abstract(make_state())).step == 10


def test_a_directory_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cannot write checkpoints to .*: Not a directory"):
        Checkpointer(tmp_path / "file" / "run")


def test_errors_of_the_run_pass_through(tmp_path):
    with pytest.raises(FileNotFoundError), Checkpointer(tmp_path):
        raise FileNotFoundError("a missing shard of the data")


def fail_in_background(checkpointer, step, limit_file_size):
    limit_file_size(1000)
    checkpointer.save(step, make_state(step), {})
    while checkpointer._manager.is_saving_in_progress():
        time.sleep(0.01)
    limit_file_size(resource.RLIM_INFINITY)


def test_a_full_disk_shows_at_the_next_save_and_at_the_end(tmp_path, limit_file_size, capfd):
    save_all(tmp_path, {10: 2.0})
    message = r"cannot write checkpoints to .*: File too large; the checkpoint of step 10 is intact"
    with Checkpointer(tmp_path) as checkpointer:
        fail_in_background(checkpointer, 20, limit_file_size)
        with pytest.raises(InputError, match=message):
            checkpointer.save(30, make_state(30), {})
        checkpointer.save(40, make_state(40), {"examples_seen": 1})  # there is space again
        assert checkpointer.restore(abstract(make_state())).step == 40
    with pytest.raises(InputError, match="File too large"), Checkpointer(tmp_path) as checkpointer:
        fail_in_background(checkpointer, 50, limit_file_size)
    assert list_steps(tmp_path) == [10, 40]
    assert "Traceback" not in "".join(capfd.readouterr())
