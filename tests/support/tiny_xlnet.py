"""A tokenizer such as XLNet's: unigrams, ``<sep><cls>`` behind the texts, names of its own."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

SPECIAL = ("<unk>", "<s>", "</s>", "<cls>", "<sep>", "<pad>", "<mask>", "<eod>", "<eop>")


def tokenizer(letters: str = "abcdefghijklm") -> Tokenizer:
    """Each letter is a token, and each with a space before it."""
    pieces = [*SPECIAL, "▁", *letters, *(f"▁{letter}" for letter in letters)]
    made = Tokenizer(models.Unigram([(piece, -2.0) for piece in pieces], unk_id=0))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    made.add_special_tokens(list(SPECIAL))
    made.post_processor = processors.TemplateProcessing(
        single="$A:0 <sep>:0 <cls>:2",
        pair="$A:0 <sep>:0 $B:1 <sep>:1 <cls>:2",
        special_tokens=[("<sep>", SPECIAL.index("<sep>")), ("<cls>", SPECIAL.index("<cls>"))],
    )
    return made
