"""GGUF files for llama.cpp: a model's tensors, config and tokenizer in one file, and such a file read back.

What the tensors and keys are called is told by `llmshearing.families.gguf`; nothing here names a family's tensor.
"""
