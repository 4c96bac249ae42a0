"""Write published_{bert,roberta}.safetensors: tiny random models as files have them, and outputs.

    pip install torch transformers
    python tests/golden/make_published_golden.py

Only this program needs the two packages; the test reads the files. ``weights/`` holds the tensors
that ``save_pretrained`` writes, under its names; the metadata holds the ``config.json``.
"""

import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.numpy import load_file, save_file
from transformers import BertConfig, BertForPreTraining, RobertaConfig, RobertaForMaskedLM

LENGTHS = [9, 6, 2]
SIZES = {
    "vocab_size": 24,
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 12,
    "layer_norm_eps": 1e-2,  # so large that it is felt
    "attn_implementation": "eager",
}


def main() -> None:
    torch.manual_seed(0)
    bert = BertConfig(**SIZES, max_position_embeddings=10, type_vocab_size=2, pad_token_id=0)
    write("bert", BertForPreTraining(bert))
    roberta = RobertaConfig(**SIZES, max_position_embeddings=12, type_vocab_size=1, pad_token_id=1)
    write("roberta", RobertaForMaskedLM(roberta))


def write(kind: str, model: transformers.PreTrainedModel) -> None:
    model.eval()
    with torch.no_grad():  # far from their initial values, so that every one of them matters
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
    tokens = torch.randint(5, model.config.vocab_size, (len(LENGTHS), max(LENGTHS)))
    mask = torch.arange(max(LENGTHS))[None, :] < torch.tensor(LENGTHS)[:, None]
    tokens = torch.where(mask, tokens, model.config.pad_token_id)
    token_types = torch.randint(model.config.type_vocab_size, tokens.shape)
    with torch.no_grad():
        out = model(
            input_ids=tokens,
            token_type_ids=token_types,
            attention_mask=mask.long(),
            output_hidden_states=True,
        )
        hidden = out.hidden_states[-1]
        arrays = {"hidden": hidden, "logits": out[0]}
        if kind == "bert":
            arrays["pooled"] = model.bert.pooler(hidden)
    arrays |= {"tokens": tokens, "token_type_ids": token_types, "lengths": torch.tensor(LENGTHS)}
    arrays = {name: np.ascontiguousarray(value.numpy()) for name, value in arrays.items()}
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        weights = load_file(Path(folder, "model.safetensors"))
        config = Path(folder, "config.json").read_text()
    arrays |= {f"weights/{name}": value for name, value in weights.items()}
    path = Path(__file__).with_name(f"published_{kind}.safetensors")
    save_file(arrays, path, metadata={"config": config})
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    print(f"{path}: {path.stat().st_size} bytes, {versions}")


if __name__ == "__main__":
    main()
