"""The decoder of Llama 3 and Llama 4 as Flax NNX modules.

Array names carry their dimensions as a suffix. The letters, here and everywhere in the repository:

====  ==========================================================
B     batch (rows of a compiled program)
T     new tokens
S     cached tokens (key positions)
D     model width (``hidden_size``)
H     query heads
K     key/value heads
G     query heads per key/value head (H = K * G)
h     head dimension
E     experts
F     feed-forward width
V     vocabulary
P     pages of the KV cache
p     tokens in a page
N     nodes of a draft tree
M     rows of a grouped matmul (tokens sorted by expert)
====  ==========================================================
"""
