"""presets.py: each row names flags that exist, and the paper's architectures have their sizes."""
import pytest

import train_ae
import train_ldm
from tinyldm import presets


@pytest.mark.parametrize("script,table", [(train_ae, presets.AE), (train_ldm, presets.LDM)])
def test_every_row_sets_flags_that_exist_and_leaves_none_open(script, table):
    for name, row in table.items():
        args = vars(script.parse_args(["--preset", name]))
        assert row.keys() <= args.keys(), name
        assert all(args[k] == v for k, v in row.items())
        open_flags = {k for k, v in args.items() if v is None}
        assert open_flags <= {"micro_batch", "vgg_weights"}, name
