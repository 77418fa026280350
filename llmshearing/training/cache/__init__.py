"""The teacher's targets on disk, keyed by sample: written once by a command, valid under any mixture and rank count.

`codec` a position's targets in a few bytes; `index` what a cache says of itself; `write` and `read` its files;
`match` whether a cache is the one of a run; `cli` the command.
"""
