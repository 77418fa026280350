"""Text to MDS shards (`prepare`), the domain mixture (`mixture`), and what the trainer reads (`dataset`,
`loader`).

Kept empty of imports, so that `python -m llmshearing.data.prepare` starts without Composer.
"""
