"""The decoder of Llama 3 and Llama 4 as Flax NNX modules.

Array names end in a suffix with a letter for each dimension (``q_BTKGh``), and annotations use the same letters (``"B T K G h"``).
Every letter has one meaning in the whole repository (``tests/test_glossary.py``):

====  ==========================================================================================
A     rows or tokens received from all ranks, one rank's after another's (R times what each of them sends)
B     rows of a batch
C     slots of a message from one rank to another
D     model width (``hidden_size``); a drafter's own in the drafter
E     experts
F     feed-forward width
G     query heads for each key/value head
I     nodes of a static draft tree that have children
K     key/value heads
L     levels of a draft tree, the root's included
M     rows of a matrix: the tokens of all rows of a batch, or the query heads of all nodes that share a key/value head
N     nodes of a draft tree, the root included
P     pages of the KV cache
R     ranks: devices along some mesh axes
S     keys that queries attend: cached tokens, the new tokens themselves, or a draft tree's nodes
T     new tokens of a row, padded; in training all tokens of a packed row
U     slots of sequences
V     vocabulary (a drafter's own if it is reduced); on a mesh, this rank's part of it
W     pages of a row, in a layer that keeps everything
X     nodes that a dynamic tree has grown, before it is cut to N
a     target layers whose input a drafter reads
b     blocks of the vocabulary, or of queries
c     children of all frontier nodes of a dynamic tree (k times k)
d     depths of drafted tokens, from 1; in training the drafter's passes, one for each depth
e     experts of this rank
f     several dimensions joined: gate and up (2 F), the heads (K G h), a drafter's features (a D), or the lists of all ranks (R j)
g     projections of one key/value head's group: its queries and its key (G + 1), or its value too (G + 2)
h     head dimension
i     input width of a matrix product
j     entries of a padded list: stop tokens, logit biases, likeliest tokens
k     frontier nodes of a dynamic tree, and the children that each gets (``topk``)
m     nodes of a draft tree, without the root (N - 1)
n     draft nodes that one pass of the drafter computes
o     output width of a matrix product
p     tokens in a page
r     pairs of dimensions that RoPE rotates (h / 2)
s     steps of a burst
t     new tokens that this rank computes, of a row's T; or the queries of a block
u     what multiplies a row in a mixture: its routed expert and, as the second, the shared one
v     tokens of a block of the vocabulary
w     pages of a row, in a chunk-local layer
z     splits of a row's cached keys, or of the inputs of a product, computed in parallel
====  ==========================================================================================

A digit is a dimension of that size. In annotations, ``*B`` stands for any number of leading dimensions, ``...`` for any shape, and
``_`` for a dimension that is compared with nothing.
"""
