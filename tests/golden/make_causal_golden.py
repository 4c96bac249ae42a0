"""Write causal_*.safetensors: tiny random GPT-2s and Llamas as files have them, and outputs.

    pip install torch transformers
    python tests/golden/make_causal_golden.py

Only this program needs the two packages; the test reads the files. ``weights/`` holds the tensors
that ``save_pretrained`` writes, under its names, and ``gradients/`` the gradient of the sum of
``sin(logits)`` over the real positions of ``right``; the metadata holds the ``config.json``.
"""

import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.numpy import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

LENGTHS = [9, 6, 2]
GPT2 = {
    "vocab_size": 24,
    "n_embd": 8,
    "n_layer": 2,
    "n_head": 2,
    "n_positions": 14,
    "layer_norm_epsilon": 1e-2,  # so large that it is felt
    "bos_token_id": 0,
    "eos_token_id": 0,
    "attn_implementation": "eager",
}
LLAMA = {
    "vocab_size": 24,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 14,
    "rms_norm_eps": 1e-2,
    "pad_token_id": None,  # whose row would get no gradient
    "attn_implementation": "eager",
}


def main() -> None:
    torch.manual_seed(0)
    write("gpt2", GPT2LMHeadModel(GPT2Config(**GPT2)))
    other = {
        "n_inner": 12,
        "activation_function": "relu",
        "scale_attn_weights": False,
        "scale_attn_by_inverse_layer_idx": True,
        "reorder_and_upcast_attn": True,
        "tie_word_embeddings": False,
    }
    write("gpt2_flags", GPT2LMHeadModel(GPT2Config(**GPT2, **other)))
    linear = {"rope_type": "linear", "factor": 3.0, "rope_theta": 50.0}
    tied = LlamaConfig(**LLAMA, tie_word_embeddings=True, rope_parameters=linear)
    write("llama", LlamaForCausalLM(tied))
    other = {
        "num_key_value_heads": 2,
        "head_dim": 6,
        "hidden_act": "gelu_pytorch_tanh",
        "attention_bias": True,
        "mlp_bias": True,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 50.0,
            "factor": 4.0,
            "low_freq_factor": 0.2,
            "high_freq_factor": 1.0,
            "original_max_position_embeddings": 10,
        },
    }
    write("llama_flags", LlamaForCausalLM(LlamaConfig(**LLAMA, **other)))


def write(kind: str, model: transformers.PreTrainedModel) -> None:
    model.eval()
    with torch.no_grad():  # far from their initial values, so that every one of them matters
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
    length = max(LENGTHS)
    counted, lengths = torch.arange(length)[None, :], torch.tensor(LENGTHS)[:, None]
    tokens = torch.randint(model.config.vocab_size, (len(LENGTHS), length))
    right = counted < lengths
    left = right.flip(1)
    # Not those that are taken without any: from 3, and behind padding on the left from 0.
    positions = {"right": (counted + 3).expand(right.shape), "left": (left.cumsum(1) - 1).clamp(0)}
    arrays = {"tokens": tokens, "real/right": right, "real/left": left}
    for side, real in (("right", right), ("left", left)):
        out = model(
            input_ids=tokens, attention_mask=real.long(), position_ids=positions[side]
        ).logits
        arrays |= {f"logits/{side}": out.detach(), f"positions/{side}": positions[side]}
        if side == "right":
            torch.where(real[..., None], torch.sin(out), 0).sum().backward()
    gradients = {f"gradients/{name}": p.grad for name, p in model.named_parameters()}
    arrays = {
        name: np.ascontiguousarray(value.numpy()) for name, value in (arrays | gradients).items()
    }
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        weights = load_file(Path(folder, "model.safetensors"))
        config = Path(folder, "config.json").read_text()
    arrays |= {f"weights/{name}": value for name, value in weights.items()}
    path = Path(__file__).with_name(f"causal_{kind}.safetensors")
    save_file(arrays, path, metadata={"config": config})
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    print(f"{path}: {path.stat().st_size} bytes, {versions}")


if __name__ == "__main__":
    main()
