"""Write bert_tiny.npz: a random BertForMaskedLM of Hugging Face, its inputs and what it computes.

    pip install torch transformers
    python tests/golden/make_bert_golden.py

Only this program needs the two packages; the test reads the file.
"""

from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import BertConfig, BertForMaskedLM

LENGTHS = [11, 7, 2]


def main() -> None:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=60,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=16,
        type_vocab_size=2,
        hidden_act="gelu",
        layer_norm_eps=1e-12,
        pad_token_id=None,
        attn_implementation="eager",
    )
    model = BertForMaskedLM(config).eval()
    with torch.no_grad():  # far from their initial values, so that every one of them matters
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    tokens = torch.randint(config.vocab_size, (len(LENGTHS), max(LENGTHS)))
    token_types = (torch.rand(tokens.shape) < 0.5).long()
    mask = torch.arange(max(LENGTHS))[None, :] < torch.tensor(LENGTHS)[:, None]
    with torch.no_grad():
        out = model(
            input_ids=tokens,
            token_type_ids=token_types,
            attention_mask=mask.long(),
            output_hidden_states=True,
        )
    arrays = {f"params/{path}": value for path, value in map_parameters(model).items()}
    arrays |= {
        "tokens": tokens.numpy(),
        "token_type_ids": token_types.numpy(),
        "lengths": np.array(LENGTHS),
        "embedded": out.hidden_states[0].numpy(),
        "hidden": torch.stack(out.hidden_states[1:]).numpy(),  # [layers, batch, length, embed]
        "logits": out.logits.numpy(),
    }
    path = Path(__file__).with_name("bert_tiny.npz")
    np.savez_compressed(path, **arrays)
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    print(f"{path}: {path.stat().st_size} bytes, {versions}")


def map_parameters(model: BertForMaskedLM) -> dict[str, np.ndarray]:
    """Our path -> value. Linear weights are [out, in] there, [in, out] or by heads here."""
    theirs = {name: value.numpy() for name, value in model.state_dict().items()}
    config = model.config
    heads = (config.num_attention_heads, config.hidden_size // config.num_attention_heads)
    ours: dict[str, np.ndarray] = {}

    def norm(path: str, name: str, get) -> None:
        ours[f"{path}/scale"], ours[f"{path}/bias"] = get(f"{name}.weight"), get(f"{name}.bias")

    def stacked(name: str) -> np.ndarray:
        layers = range(config.num_hidden_layers)
        return np.stack([theirs[f"bert.encoder.layer.{layer}.{name}"] for layer in layers])

    def linear(path: str, name: str, get, kernel=(), bias=()) -> None:
        weight = get(f"{name}.weight")
        weight = np.swapaxes(weight, -1, -2)
        ours[f"{path}/kernel"] = weight.reshape(*weight.shape[:-2], *(kernel or weight.shape[-2:]))
        value = get(f"{name}.bias")
        ours[f"{path}/bias"] = value.reshape(*value.shape[:-1], *(bias or value.shape[-1:]))

    embeddings = "bert.embeddings"
    ours["encoder/token_embed/embedding"] = theirs[f"{embeddings}.word_embeddings.weight"]
    ours["encoder/position_embed/embedding"] = theirs[f"{embeddings}.position_embeddings.weight"]
    ours["encoder/token_type_embed/embedding"] = theirs[
        f"{embeddings}.token_type_embeddings.weight"
    ]
    norm("encoder/embed_norm", f"{embeddings}.LayerNorm", theirs.get)
    for name in ("query", "key", "value"):
        path = f"encoder/layers/attention/{name}"
        linear(path, f"attention.self.{name}", stacked, (config.hidden_size, *heads), heads)
    out = (*heads, config.hidden_size)
    linear("encoder/layers/attention/out", "attention.output.dense", stacked, out)
    norm("encoder/layers/attention_norm", "attention.output.LayerNorm", stacked)
    linear("encoder/layers/mlp/up", "intermediate.dense", stacked)
    linear("encoder/layers/mlp/down", "output.dense", stacked)
    norm("encoder/layers/mlp_norm", "output.LayerNorm", stacked)
    linear("head/transform", "cls.predictions.transform.dense", theirs.get)
    norm("head/norm", "cls.predictions.transform.LayerNorm", theirs.get)
    ours["head/bias"] = theirs["cls.predictions.bias"]
    return ours


if __name__ == "__main__":
    main()
