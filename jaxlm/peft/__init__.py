"""Parameter-efficient fine-tuning: adapters, scales, frozen weights in eight bits."""
