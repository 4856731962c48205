"""The tables beside this file: what a reader may want to edit without touching code.

* `healthy_beat.csv`: the Gaussian waves of a healthy beat, phase and width in radians, the dipole
  in mV. After Sameni 2007, whose one subject had a flat P in II and a steep S in III: P and the y
  and z forces are set to median amplitudes of PTB-XL's normal ECGs, and the broadest T waves are
  narrowed so that the ST segment is level.
* `findings.csv`: the waves that a finding of size 1 adds, centre and width in seconds.
* `regions.csv`: unit vectors from the heart's centre to the regions of the left ventricle, and what
  single chest electrodes see of a near wall beyond the dipole.
* `lead_field.csv`: leads seen by a dipole (Dower et al., Clin Cardiol 1980).
* `statements.csv`: SCP-ECG statements as PTB-XL writes them, the superclass of a condition, and
  where the evidence lies: leads, from which mark to which mark, in which kinds of beat.
* `shares.csv`: the share of patients with each combination of superclasses, after PTB-XL (Wagner et
  al., Sci Data 2020); within a superclass, the share of each condition or pair of conditions.
"""

from pathlib import Path

import pandas as pd


def read_table(name: str) -> pd.DataFrame:
    """One of the tables; empty cells are empty text."""
    return pd.read_csv(Path(__file__).with_name(f"{name}.csv"), keep_default_na=False)
