"""Label-efficient learning on 12-lead ECGs: the thin package that the notebooks import.

In this order it reads well:

1. `records` is what flows: int16 signals, labels, folds. `labels` draws subsets of the labels.
   `sources` reads data sets and simulates hearts, `preprocess` repairs what it can. `errors` and
   `files` are what all of these share; `plot_ecg` draws ECGs on paper.
2. `batches` cuts crops on the device, `augment` changes them, `noise` adds noise of a known size.
3. `encoders` holds the networks, one file each, and their registry.
4. `train` is the one training loop, `checkpoints` keeps weights, `ema` averages them over steps,
   `distributed` knows the other processes, `settings` is the base of all settings.
5. The methods, one file each: `supervised`, `selfsup` (without labels), `semisup` (with few),
   `lora` and `ranks` (low-rank adaptation), `fusion` (of frozen encoders).
6. `probe` fits linear classifiers on frozen features, `evaluate` measures with intervals, and
   `saliency` says which samples an answer rests on.
"""
