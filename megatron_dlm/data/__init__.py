"""What the trainers read: prompts, supervised samples and tokenizers."""
