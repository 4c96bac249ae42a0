"""A worker of ``benchmark.py``: Hugging Face transformers, and peft for LoRA.

``shipped`` is the model and its usual training step: the loss of its own forward pass (labels of
-100 outside the masked positions), SDPA attention, the padding mask a collator makes, and fused
AdamW (the Trainer's default optimizer). ``tuned`` sends only the masked positions to the
vocabulary, or all but a row's last, passes no mask, since no row is padded, and with bfloat16 keeps
frozen matrices in it;
``compiled`` is that under ``torch.compile``. Gradients are not clipped. LoRA trains what peft
trains unasked: the adapters and the last layer.
"""
# pyright: reportMissingImports=false

from collections.abc import Callable

import torch
import transformers
from benchmark_protocol import Work, read_work, serve

LossOfBatch = Callable[[], torch.Tensor]  # forward pass on one random batch


def make_config(work: Work) -> transformers.BertConfig:
    return transformers.BertConfig(
        vocab_size=work.vocab_size,
        hidden_size=work.hidden_dim,
        num_hidden_layers=work.num_layers,
        num_attention_heads=work.num_heads,
        intermediate_size=work.mlp_dim,
        max_position_embeddings=max(512, work.row_length),
        hidden_dropout_prob=work.dropout_rate,
        attention_probs_dropout_prob=work.dropout_rate,
        num_labels=work.num_labels,
        attn_implementation="sdpa",
    )


def random_tokens(work: Work) -> torch.Tensor:
    return torch.randint(
        1000, work.vocab_size, (work.batch_size, work.row_length), device=work.device
    )


def masked(work: Work) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens, of which some are masked, their labels, and the padding mask of full rows."""
    tokens = random_tokens(work)
    ranks = torch.rand(tokens.shape, device=work.device).argsort(dim=1)
    chosen = ranks[:, : work.num_masked]
    labels = torch.full_like(tokens, -100).scatter(1, chosen, tokens.gather(1, chosen))
    tokens = tokens.scatter(1, chosen, 103)
    return tokens, labels, torch.ones_like(tokens)


def pretraining(work: Work) -> tuple[torch.nn.Module, LossOfBatch]:
    """``BertForMaskedLM``."""
    model = transformers.BertForMaskedLM(make_config(work)).to(work.device).train()
    tokens, labels, attention_mask = masked(work)
    flat = (labels != -100).flatten().nonzero().squeeze(1)
    flat_labels = labels.flatten()[flat]

    def shipped() -> torch.Tensor:
        return model(input_ids=tokens, attention_mask=attention_mask, labels=labels).loss

    def tuned() -> torch.Tensor:
        hidden = model.bert(tokens).last_hidden_state
        return torch.nn.functional.cross_entropy(model.cls(hidden.flatten(0, 1)[flat]), flat_labels)

    return model, shipped if work.recipe == "shipped" else tuned


def modern_pretraining(work: Work) -> tuple[torch.nn.Module, LossOfBatch]:
    """``ModernBertForMaskedLM``; tuned, with its own sparse prediction."""
    config = transformers.ModernBertConfig(
        vocab_size=work.vocab_size,
        hidden_size=work.hidden_dim,
        num_hidden_layers=work.num_layers,
        num_attention_heads=work.num_heads,
        intermediate_size=work.mlp_dim,
        max_position_embeddings=max(1024, work.row_length),
        embedding_dropout=work.dropout_rate,
        attention_dropout=work.dropout_rate,
        mlp_dropout=work.dropout_rate,
        sparse_prediction=work.recipe != "shipped",
        attn_implementation="sdpa",
    )
    model = transformers.ModernBertForMaskedLM(config).to(work.device).train()
    tokens, labels, attention_mask = masked(work)

    def shipped() -> torch.Tensor:
        return model(input_ids=tokens, attention_mask=attention_mask, labels=labels).loss

    def tuned() -> torch.Tensor:
        return model(input_ids=tokens, labels=labels).loss

    return model, shipped if work.recipe == "shipped" else tuned


def causal_pretraining(work: Work) -> tuple[torch.nn.Module, LossOfBatch]:
    """``GPT2LMHeadModel``."""
    config = transformers.GPT2Config(
        vocab_size=work.vocab_size,
        n_embd=work.hidden_dim,
        n_layer=work.num_layers,
        n_head=work.num_heads,
        n_inner=work.mlp_dim,
        n_positions=max(1024, work.row_length),
        resid_pdrop=work.dropout_rate,
        embd_pdrop=work.dropout_rate,
        attn_pdrop=work.dropout_rate,
        attn_implementation="sdpa",
    )
    model = transformers.GPT2LMHeadModel(config).to(work.device).train()
    tokens = random_tokens(work)
    attention_mask = torch.ones_like(tokens)

    def shipped() -> torch.Tensor:
        return model(input_ids=tokens, attention_mask=attention_mask, labels=tokens).loss

    def tuned() -> torch.Tensor:
        hidden = model.transformer(tokens, use_cache=False).last_hidden_state[:, :-1]
        logits = model.lm_head(hidden.flatten(0, 1))
        return torch.nn.functional.cross_entropy(logits, tokens[:, 1:].flatten())

    return model, shipped if work.recipe == "shipped" else tuned


def fine_tuning(work: Work) -> tuple[torch.nn.Module, LossOfBatch]:
    """``BertForSequenceClassification``, with adapters for LoRA."""
    model = transformers.BertForSequenceClassification(make_config(work))
    if work.task == "lora":
        import peft

        adapters = peft.LoraConfig(
            task_type=peft.TaskType.SEQ_CLS,
            r=work.rank,
            lora_alpha=work.alpha,
            target_modules=["query", "value"],
        )
        model = peft.get_peft_model(model, adapters)
        if work.recipe != "shipped" and work.dtype == "bfloat16":
            for parameter in model.parameters():
                if parameter.ndim == 2 and not parameter.requires_grad:
                    parameter.data = parameter.data.bfloat16()
    model = model.to(work.device).train()
    tokens = random_tokens(work)
    attention_mask = torch.ones_like(tokens)
    labels = torch.arange(work.batch_size, device=work.device) % work.num_labels

    def shipped() -> torch.Tensor:
        return model(input_ids=tokens, attention_mask=attention_mask, labels=labels).loss

    def tuned() -> torch.Tensor:
        return model(input_ids=tokens, labels=labels).loss

    return model, shipped if work.recipe == "shipped" else tuned


MAKERS = {
    "mlm": pretraining,
    "modern": modern_pretraining,
    "clm": causal_pretraining,
    "lora": fine_tuning,
    "full": fine_tuning,
}


def main() -> None:
    """Build the step and serve it."""
    work = read_work()
    torch.manual_seed(0)
    if work.recipe != "shipped" and work.device == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32, as JAX multiplies on a GPU
    model, loss_of_batch = MAKERS[work.task](work)
    if work.recipe == "compiled":
        loss_of_batch = torch.compile(loss_of_batch)
    optimizer = torch.optim.AdamW(
        [parameter for parameter in model.parameters() if parameter.requires_grad],
        lr=work.peak_lr,
        weight_decay=work.weight_decay,
        fused=True,
    )
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

    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    if work.task == "lora":
        import peft

        versions += f", peft {peft.__version__}"
    serve(
        work,
        versions=versions,
        device_name=torch.cuda.get_device_name() if work.device == "cuda" else "",
        compiles=work.recipe == "compiled",
        step=step,
        finish=finish,
        device_peak_bytes=torch.cuda.max_memory_allocated,
    )


if __name__ == "__main__":
    main()
