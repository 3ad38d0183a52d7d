"""The kinds of step that a model takes, one a file: which keys each new token attends, and where its own key is kept.

New tokens are either *replicated*: every token rank computes all of them (decoding; one device); or *spread*: each rank
computes some of them (prefill over several ranks). In both cases each rank caches a part of the keys: ``cache.rank_of``
says which part. Replicated tokens are consecutive, or the nodes of a draft *tree*. Training's sequences are *packed* into rows.
"""
