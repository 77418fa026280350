"""Text in: documents of JSONL and Parquet files, compression, tokenizers, token frequencies."""
