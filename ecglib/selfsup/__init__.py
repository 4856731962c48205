"""Self-supervised objectives: one method, one file, each an `nn.Module` that `ecglib.train.fit`
trains.

Each takes an encoder, keeps the network to be probed afterwards as `.encoder`, and has
`.loss(batch)`.
"""
