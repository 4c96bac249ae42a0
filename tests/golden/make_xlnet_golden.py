"""Write xlnet_*.safetensors: tiny random XLNets as files have them, and what they give.

    pip install torch transformers
    python tests/golden/make_xlnet_golden.py

Only this program needs the two packages; the test reads the files. ``weights/`` holds the tensors
that ``save_pretrained`` writes, under its names. ``logits/left`` and ``logits/right`` are of the
content stream, with padding on that side; ``logits/query`` of the query stream, with a memory and
a permutation, ``memory/new`` what is remembered then, and ``gradients/`` those of the sum of the
sine of its logits. The metadata holds the ``config.json``.
"""

import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.numpy import load_file, save_file
from transformers import XLNetConfig, XLNetLMHeadModel

LENGTHS, NUM_PREDICTED, MEMORY = [9, 6, 4], 3, 4
SIZES = {
    "vocab_size": 24,
    "d_model": 8,
    "n_layer": 2,
    "n_head": 2,
    "d_inner": 12,
    "layer_norm_eps": 1e-2,  # so large that it is felt
    "mem_len": 7,
    "reuse_len": 5,
    "dropout": 0.2,
}


def main() -> None:
    torch.manual_seed(0)
    write("bi", XLNetLMHeadModel(XLNetConfig(**SIZES, clamp_len=3, ff_activation="gelu_new")))
    write("uni", XLNetLMHeadModel(XLNetConfig(**SIZES, attn_type="uni")))


def write(kind: str, model: transformers.PreTrainedModel) -> None:
    model.eval()
    with torch.no_grad():  # far from their initial values, so that every one of them matters
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
    rows, length, rng = len(LENGTHS), max(LENGTHS), np.random.default_rng(0)
    tokens = rng.integers(0, model.config.vocab_size, (rows, length))
    types = rng.integers(0, 3, tokens.shape)
    right = np.arange(length)[None] < np.array(LENGTHS)[:, None]
    order = rng.permuted(np.tile(np.arange(length), (rows, 1)), axis=1)
    arrays = {
        "tokens": tokens,
        "types": types,
        "real/right": right,
        "real/left": right[:, ::-1],
        "sees": order[:, None, :] < order[:, :, None],
        "predicted": np.argsort(order, axis=1)[:, -NUM_PREDICTED:],
        "memory/old": rng.normal(size=(model.config.n_layer, rows, MEMORY, 8)).astype(np.float32),
    }
    axis = lambda name: int(name.startswith("memory"))  # of rows
    row = lambda i: {name: np.take(x, [i], axis(name)) for name, x in arrays.items()}
    outputs = [run(model, row(i)) for i in range(rows)]
    for name in outputs[0]:
        arrays[name] = np.concatenate([output[name] for output in outputs], axis(name))
    arrays |= {f"gradients/{name}": p.grad.numpy() for name, p in model.named_parameters()}
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        weights = load_file(Path(folder, "model.safetensors"))
        config = Path(folder, "config.json").read_text()
    arrays |= {f"weights/{name}": value for name, value in weights.items()}
    arrays = {name: np.ascontiguousarray(value) for name, value in arrays.items()}
    path = Path(__file__).with_name(f"xlnet_{kind}.safetensors")
    save_file(arrays, path, metadata={"config": config})
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    print(f"{path}: {path.stat().st_size} bytes, {versions}")


def run(model: transformers.PreTrainedModel, arrays: dict[str, np.ndarray]) -> dict:
    """What one row gives (of more, ``uni`` cannot be masked there); gradients add up."""
    given = {"input_ids": arrays["tokens"], "token_type_ids": arrays["types"]}
    given = {name: torch.tensor(value) for name, value in given.items()}
    found = {}
    for side in ("left", "right"):
        real = torch.tensor(arrays[f"real/{side}"].astype(np.float32))
        found[f"logits/{side}"] = model(**given, attention_mask=real).logits.detach().numpy()
    sees = arrays["sees"] & arrays["real/right"][:, None]
    out = model(
        **given,
        perm_mask=torch.tensor(~sees).float(),
        target_mapping=torch.eye(sees.shape[-1])[arrays["predicted"]],
        mems=[torch.tensor(x).transpose(0, 1) for x in arrays["memory/old"]],
        use_mems=True,
    )
    torch.sin(out.logits).sum().backward()
    mems = np.stack([x.transpose(0, 1).numpy() for x in out.mems])
    return found | {"logits/query": out.logits.detach().numpy(), "memory/new": mems}


if __name__ == "__main__":
    main()
