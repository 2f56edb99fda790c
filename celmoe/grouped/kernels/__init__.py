"""Products, sums and scales by member, on plain tensors and segments.

- `product`: sums of products by segment, and the backends that compute them
- `members`: a linear layer of every member, which reads the members' own weights
- `affine`: rows scaled and shifted by their member's vectors
"""
