"""Products, sums and scales by member, on plain tensors and segments.

- `product`: sums of products by segment, and the backends that compute them
- `even`: the backend for stacks whose members have about equally many rows
- `gru`: a recurrent layer of all members
- `operators`: these as operators of compiled graphs
- `members`: a linear layer of every member, which reads the members' own weights
- `affine`: rows scaled and shifted by their member's vectors
"""
