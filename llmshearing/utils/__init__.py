"""The commands that users of the predecessor type: `python3 -m llmshearing.utils.<name>`."""
