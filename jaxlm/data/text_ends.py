"""What begins and ends a text in the vocabularies of BERT, RoBERTa, GPT-2 and Llama."""

from tokenizers import Tokenizer

_KNOWN = {
    "bos": ("[CLS]", "<s>", "<|begin_of_text|>", "<|endoftext|>"),
    "eos": ("[SEP]", "</s>", "<|end_of_text|>", "<|endoftext|>"),
    "pad": ("[PAD]", "<pad>"),
}


def text_ends(tokenizer: Tokenizer) -> dict[str, int]:
    """The ids of ``bos``, ``eos`` and ``pad``, of those of them that the tokenizer has.

    GPT-2's one token is both ends.
    """
    found: dict[str, int] = {}
    for name, tokens in _KNOWN.items():
        ids = [i for token in tokens if (i := tokenizer.token_to_id(token)) is not None]
        if ids:
            found[name] = ids[0]
    return found
