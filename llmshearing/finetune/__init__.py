"""Finetuning of Hugging Face directories: full or LoRA, on text, prompts or chats; zeroed models keep their zeros."""
