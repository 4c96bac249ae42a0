"""Write classifier_tiny.npz: a random BertForSequenceClassification and what it computes.

    pip install torch transformers
    python tests/golden/make_classifier_golden.py

Only this program needs the two packages; the test reads the file.
"""

from pathlib import Path

import numpy as np
import torch
import transformers
from make_bert_golden import map_parameters
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification

LENGTHS = [9, 5, 2]


def main() -> None:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=20,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=10,
        hidden_act="gelu",
        num_labels=3,
        pad_token_id=None,
        attn_implementation="eager",
    )
    model = BertForSequenceClassification(config).eval()
    with torch.no_grad():  # far from their initial values, so that every one of them matters
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
    tokens = torch.randint(config.vocab_size, (len(LENGTHS), max(LENGTHS)))
    token_types = (torch.rand(tokens.shape) < 0.5).long()
    mask = torch.arange(max(LENGTHS))[None, :] < torch.tensor(LENGTHS)[:, None]
    with torch.no_grad():
        logits = model(
            input_ids=tokens, token_type_ids=token_types, attention_mask=mask.long()
        ).logits
    with_mlm_head = BertForMaskedLM(config)
    with_mlm_head.bert.load_state_dict(model.bert.state_dict(), strict=False)
    params = {
        path: value
        for path, value in map_parameters(with_mlm_head).items()
        if path.startswith("encoder/")
    }
    for name, layer in (("pooler", model.bert.pooler.dense), ("classifier", model.classifier)):
        params[f"head/{name}/kernel"] = layer.weight.detach().numpy().T
        params[f"head/{name}/bias"] = layer.bias.detach().numpy()
    arrays = {f"params/{path}": value for path, value in params.items()}
    arrays |= {
        "tokens": tokens.numpy(),
        "token_type_ids": token_types.numpy(),
        "lengths": np.array(LENGTHS),
        "logits": logits.numpy(),
    }
    path = Path(__file__).with_name("classifier_tiny.npz")
    np.savez_compressed(path, **arrays)
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    print(f"{path}: {path.stat().st_size} bytes, {versions}")


if __name__ == "__main__":
    main()
