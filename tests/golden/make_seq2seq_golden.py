"""Write seq2seq_*.safetensors: tiny random T5s, and the Transformer of torch, and their outputs.

    pip install torch transformers
    python tests/golden/make_seq2seq_golden.py

Only this program needs the two packages; the tests read the files. ``weights/`` holds the tensors
of T5 as ``save_pretrained`` writes them, and those of the Transformer by our paths, and
``gradients/`` the gradient of the sum of ``sin(logits)`` over the real positions of ``right``; the
metadata holds the ``config.json``.
"""

import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.numpy import load_file, save_file
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration

SOURCES, TARGETS = [11, 7, 2], [9, 4, 6]
VOCAB = 24
T5 = {
    "vocab_size": VOCAB,
    "d_model": 8,
    "d_kv": 6,
    "d_ff": 12,
    "num_heads": 2,
    "num_layers": 2,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 6,  # rows are longer
    "layer_norm_epsilon": 1e-2,  # so large that it is felt
    "pad_token_id": 0,
    "eos_token_id": 1,
    "decoder_start_token_id": 0,
}
TRANSFORMER = {"d_model": 8, "nhead": 2, "num_encoder_layers": 2, "num_decoder_layers": 3}


def main() -> None:
    torch.manual_seed(0)
    write_t5("t5", T5Config(**T5))
    other = {"num_decoder_layers": 3, "feed_forward_proj": "gated-gelu"}
    write_t5("t5_flags", T5Config(**T5, **other, tie_word_embeddings=False), untied=True)
    write_transformer()


def inputs() -> dict[str, torch.Tensor]:
    """Tokens of both sides, and which are real where padding is on the right or the left."""
    arrays = {}
    for name, lengths in (("tokens", SOURCES), ("decoder_tokens", TARGETS)):
        counted = torch.arange(max(lengths))[None, :]
        right = counted < torch.tensor(lengths)[:, None]
        arrays[name] = torch.randint(VOCAB, right.shape)
        arrays |= {f"{name}/right": right, f"{name}/left": right.flip(1)}
    return arrays


def disturb(parameters: Any) -> None:
    """Far from their initial values, so that every one of them matters."""
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(0.3 * torch.randn(parameter.shape))


def outputs(call: Callable[..., torch.Tensor]) -> dict[str, torch.Tensor]:
    arrays = inputs()
    for side in ("right", "left"):
        real = arrays[f"tokens/{side}"], arrays[f"decoder_tokens/{side}"]
        logits = call(arrays["tokens"], arrays["decoder_tokens"], *real)
        arrays[f"logits/{side}"] = logits.detach()
        if side == "right":
            torch.where(real[1][..., None], torch.sin(logits), 0).sum().backward()
    return arrays


def write_t5(kind: str, config: T5Config, *, untied: bool = False) -> None:
    config._attn_implementation = "eager"
    model = T5ForConditionalGeneration(config).eval()
    if untied:
        model.lm_head.weight = nn.Parameter(torch.randn(VOCAB, config.d_model))
    disturb(model.parameters())

    def call(tokens, decoder_tokens, real, decoder_real):
        return model(
            input_ids=tokens,
            attention_mask=real.long(),
            decoder_input_ids=decoder_tokens,
            decoder_attention_mask=decoder_real.long(),
        ).logits

    arrays = outputs(call)
    arrays["generated"] = model.generate(
        arrays["tokens"],
        attention_mask=arrays["tokens/right"].long(),
        do_sample=False,
        max_new_tokens=10,
        use_cache=False,  # transformers 5.24 makes one for as many layers as the encoder has
        eos_token_id=None,
    )
    arrays |= {f"gradients/{name}": p.grad for name, p in model.named_parameters()}
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        weights = load_file(Path(folder, "model.safetensors"))
        raw = Path(folder, "config.json").read_text()
    arrays |= {f"weights/{name}": torch.tensor(value) for name, value in weights.items()}
    write(kind, arrays, {"config": raw})


def write_transformer() -> None:
    """``torch.nn.Transformer`` without its last norms, and with attention's biases at 0."""
    sizes = {**TRANSFORMER, "dim_feedforward": 12, "dropout": 0.0, "layer_norm_eps": 1e-2}
    model = nn.Transformer(**sizes, batch_first=True)
    model.encoder.norm = model.decoder.norm = None
    table = nn.Parameter(torch.randn(VOCAB, 8) * 8**-0.5)
    disturb(p for name, p in model.named_parameters() if "attn" not in name or "bias" not in name)

    def embed(tokens):
        return table[tokens] * 8**0.5 + torch.tensor(
            [
                [(math.cos, math.sin)[i % 2 == 0](p / 10_000 ** (i // 2 * 2 / 8)) for i in range(8)]
                for p in range(tokens.shape[1])
            ]
        )

    def call(tokens, decoder_tokens, real, decoder_real):
        length = decoder_tokens.shape[1]
        hidden = model(
            embed(tokens),
            embed(decoder_tokens),
            # A target that is padded on the left sees its padding: of it, nothing is compared.
            tgt_mask=torch.ones(length, length).triu(1).bool(),
            src_key_padding_mask=~real,
            memory_key_padding_mask=~real,
        )
        return hidden @ table.T

    model.train()  # in evaluation torch takes other code
    arrays = outputs(call)
    own = {"encoder/token_embed/embedding": table}
    for side in ("encoder", "decoder"):
        own |= layers(f"encoder/{side}_layers", getattr(model, side).layers, side == "decoder")
    arrays |= {f"weights/{path}": value for path, (value, _) in pairs(own).items()}
    arrays |= {f"gradients/{path}": gradient for path, (_, gradient) in pairs(own).items()}
    write("transformer", arrays, {})


def pairs(own: dict[str, Any]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Parameters and their gradients, laid out as ours are."""
    plain = lambda x: x
    made = {}
    for path, value in own.items():
        tensors, shape = value if isinstance(value, tuple) else ([value], plain)
        both = ([t.detach() for t in tensors], [t.grad for t in tensors])
        stack = torch.stack if isinstance(value, tuple) else lambda x: x[0]
        made[path] = tuple(stack([shape(x) for x in one]).contiguous() for one in both)
    return made


def layers(path: str, blocks: Any, decoder: bool) -> dict[str, Any]:
    """Our paths -> the parameters of the layers, and the layout of one."""
    heads, inside = 2, lambda x: x.T.reshape(8, 2, 4)
    out = lambda x: x.T.reshape(heads, 4, 8)
    names = {"attention": ("self_attn", "norm1"), "mlp": (None, "norm3" if decoder else "norm2")}
    if decoder:
        names["cross_attention"] = ("multihead_attn", "norm2")
    own: dict[str, Any] = {}
    for ours, (attention, norm) in names.items():
        norms = [getattr(block, norm) for block in blocks]
        own[f"{path}/{ours}_norm/scale"] = [n.weight for n in norms], lambda x: x
        own[f"{path}/{ours}_norm/bias"] = [n.bias for n in norms], lambda x: x
        if attention is None:
            continue
        found = [getattr(block, attention) for block in blocks]
        for i, name in enumerate(("query", "key", "value")):
            part = lambda x, i=i: inside(x[8 * i : 8 * i + 8])
            own[f"{path}/{ours}/{name}/kernel"] = [a.in_proj_weight for a in found], part
        own[f"{path}/{ours}/out/kernel"] = [a.out_proj.weight for a in found], out
    for ours, theirs in (("up", "linear1"), ("down", "linear2")):
        maps = [getattr(block, theirs) for block in blocks]
        own[f"{path}/mlp/{ours}/kernel"] = [m.weight for m in maps], lambda x: x.T
        own[f"{path}/mlp/{ours}/bias"] = [m.bias for m in maps], lambda x: x
    return own


def write(kind: str, arrays: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    path = Path(__file__).with_name(f"seq2seq_{kind}.safetensors")
    values = {name: np.ascontiguousarray(value.numpy()) for name, value in arrays.items()}
    save_file(values, path, metadata=metadata)
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    print(f"{path}: {path.stat().st_size} bytes, {versions}")


if __name__ == "__main__":
    main()
