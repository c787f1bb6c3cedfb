"""The memory arithmetic: integers in, integers out, standard library only.

Nothing here imports torch, numpy or `quantkit`. A caller describes a model's shapes with plain
numbers and gets bytes back; `quantkit.estimate` is the caller that knows models and precisions.
"""
