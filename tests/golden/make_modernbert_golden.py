"""Write modernbert*.safetensors: tiny random ModernBERTs as files have them, and what they give.

    pip install torch transformers
    python tests/golden/make_modernbert_golden.py

Only this program needs the two packages; the tests read the files. ``weights/`` holds the tensors
that ``save_pretrained`` writes, under its names, ``logits/left`` and ``logits/right`` what comes
out with padding on that side, of rows longer than the window and than 128, ``logits/alone`` that
of two documents which stand in ``packed`` one behind the other, each by itself, and
``gradients/`` those of the sum of the sine of ``logits/right``. The metadata holds the
``config.json``.
"""

import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.numpy import load_file, save_file
from transformers import ModernBertConfig, ModernBertForMaskedLM

LENGTHS, DOCUMENTS = [140, 90], [80, 60]
SIZES = {
    "vocab_size": 16,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "max_position_embeddings": 140,
    "local_attention": 20,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "cls_token_id": 1,
    "sep_token_id": 2,
}
# Each key at another value than its default; so are the sizes.
FLAGS = {
    "num_hidden_layers": 3,
    "global_attn_every_n_layers": 2,
    "rope_parameters": {
        "full_attention": {"rope_type": "default", "rope_theta": 700.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 90.0},
    },
    "local_attention": 6,
    "hidden_activation": "silu",
    "classifier_activation": "gelu_new",
    "classifier_pooling": "mean",
    "norm_eps": 1e-2,
    "norm_bias": True,
    "attention_bias": True,
    "mlp_bias": True,
    "classifier_bias": True,
    "decoder_bias": False,
    "embedding_dropout": 0.1,
    "attention_dropout": 0.2,
    "mlp_dropout": 0.3,
}


def main() -> None:
    torch.manual_seed(0)
    here = Path(__file__).parent
    write(here / "modernbert.safetensors", ModernBertConfig(**SIZES))
    write(here / "modernbert_flags.safetensors", ModernBertConfig(**SIZES | FLAGS))


def write(path: Path, config: ModernBertConfig) -> None:
    """A random model of that configuration, and what it gives."""
    model = scramble(ModernBertForMaskedLM(config))
    length, rng = max(LENGTHS), np.random.default_rng(0)
    tokens = rng.integers(3, config.vocab_size, (len(LENGTHS), length))
    right = np.arange(length)[None] < np.array(LENGTHS)[:, None]
    arrays = {"tokens": tokens, "real/right": right, "real/left": right[:, ::-1]}
    for side in ("left", "right"):
        real = torch.tensor(arrays[f"real/{side}"].copy())
        logits = model(torch.tensor(tokens), attention_mask=real.long()).logits
        arrays[f"logits/{side}"] = logits.detach().numpy()
    torch.sin(logits[real]).sum().backward()
    arrays |= {f"gradients/{name}": p.grad.numpy() for name, p in model.named_parameters()}
    arrays["packed"] = tokens[:1]
    arrays["documents"] = np.repeat(np.arange(len(DOCUMENTS)), DOCUMENTS)[None]
    alone = torch.tensor(arrays["packed"]).split(DOCUMENTS, dim=1)
    with torch.no_grad():
        logits = [model(document).logits.numpy() for document in alone]
    arrays["logits/alone"] = np.concatenate(logits, axis=1)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        weights = load_file(Path(folder, "model.safetensors"))
        said = Path(folder, "config.json").read_text()
    arrays |= {f"weights/{name}": value for name, value in weights.items()}
    arrays = {name: np.ascontiguousarray(value) for name, value in arrays.items()}
    save_file(arrays, path, metadata={"config": said})
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    print(f"{path}: {path.stat().st_size} bytes, {versions}")


def scramble(model: transformers.PreTrainedModel) -> transformers.PreTrainedModel:
    """Far from the initial values, so that every one of them matters; without dropout."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
    return model.eval()


if __name__ == "__main__":
    main()
