"""A worker of ``benchmark.py mlm``: ``BertForMaskedLM`` of Hugging Face transformers.

``shipped`` is the model and its usual training step: labels of -100 outside the masked positions,
the loss of its own forward pass, SDPA attention, the padding mask a collator makes, and fused AdamW
(the Trainer's default optimizer). ``tuned`` sends only the masked positions to the vocabulary and
passes no mask, since no row is padded; ``compiled`` is that under ``torch.compile``. Gradients are
not clipped.
"""
# pyright: reportMissingImports=false

import torch
import transformers
from benchmark_protocol import Work, read_work, serve


def make_loss(work: Work, model: transformers.BertForMaskedLM):
    """A function of no arguments: forward pass and loss on one random batch."""
    device = torch.device(work.device)
    rows, length = work.batch_size, work.row_length
    tokens = torch.randint(1000, work.vocab_size, (rows, length), device=device)
    masked = torch.rand(rows, length, device=device).argsort(dim=1)[:, : work.num_masked]
    labels = torch.full_like(tokens, -100).scatter(1, masked, tokens.gather(1, masked))
    tokens = tokens.scatter(1, masked, 103)
    attention_mask = torch.ones_like(tokens)
    flat = (labels != -100).flatten().nonzero().squeeze(1)
    flat_labels = labels.flatten()[flat]

    def shipped():
        return model(input_ids=tokens, attention_mask=attention_mask, labels=labels).loss

    def tuned():
        hidden = model.bert(tokens).last_hidden_state
        return torch.nn.functional.cross_entropy(model.cls(hidden.flatten(0, 1)[flat]), flat_labels)

    if work.recipe == "shipped":
        return shipped
    return torch.compile(tuned) if work.recipe == "compiled" else tuned


def main() -> None:
    """Build the step and serve it."""
    work = read_work()
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=work.vocab_size,
        hidden_size=work.hidden_dim,
        num_hidden_layers=work.num_layers,
        num_attention_heads=work.num_heads,
        intermediate_size=work.mlp_dim,
        max_position_embeddings=max(512, work.row_length),
        hidden_dropout_prob=work.dropout_rate,
        attention_probs_dropout_prob=work.dropout_rate,
        attn_implementation="sdpa",
    )
    model = transformers.BertForMaskedLM(config).to(work.device).train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=work.peak_lr, weight_decay=work.weight_decay, fused=True
    )
    loss_of_batch = make_loss(work, model)
    mixed = work.dtype == "bfloat16"

    def step() -> torch.Tensor:
        with torch.autocast(work.device, dtype=torch.bfloat16, enabled=mixed):
            loss = loss_of_batch()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    def finish(loss: torch.Tensor) -> float:
        if work.device == "cuda":
            torch.cuda.synchronize()
        return loss.item()

    serve(
        work,
        versions=f"torch {torch.__version__}, transformers {transformers.__version__}",
        device_name=torch.cuda.get_device_name() if work.device == "cuda" else "",
        compiles=work.recipe == "compiled",
        step=step,
        finish=finish,
        device_peak_bytes=torch.cuda.max_memory_allocated,
    )


if __name__ == "__main__":
    main()
