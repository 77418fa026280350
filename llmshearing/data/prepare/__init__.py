"""From folders of text to MDS: `python -m llmshearing.data.prepare` (the work is in `run`).

Empty of imports: worker processes import this package again, and must need neither Streaming nor torch.
"""
