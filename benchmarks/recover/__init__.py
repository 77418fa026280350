"""Which way to a compact model recovers best? One source, one target, equal tokens, by the commands that users type.

setting   source, texts, target, budgets of tokens                  settings.py
row       how to choose, and how to train on: a recipe              rows.py
cell      a row with a seed and a budget; its stages are commands   cell.py, commands.py
report    table, JSON, plot                                         report.py
"""
