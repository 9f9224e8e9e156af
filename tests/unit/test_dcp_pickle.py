"""An index that was pickled without torch's classes is the one that torch's classes make."""

import pickle
import subprocess
import sys

import pytest
import torch
from torch.distributed.checkpoint import metadata as real
from torch.distributed.checkpoint.filesystem import _StorageInfo

from megagrow.checkpoint import dcp_pickle as ours
from megagrow.checkpoint.dtypes import DType


def test_torch_reads_its_own_classes() -> None:
    tensor = ours.TensorStorageMetadata(DType.BFLOAT16, (4, 6))
    tensor.chunks += [ours.ChunkStorageMetadata((0, 0), (2, 6)), ours.ChunkStorageMetadata((2, 0), (2, 6))]
    content = {"a.weight": tensor, "an.object": ours.BytesStorageMetadata()}
    places = {
        ours.MetadataIndex("a.weight", (0, 0)): ours.StorageInfo("__0_0.distcp", 0, 512),
        ours.MetadataIndex("a.weight", (2, 0)): ours.StorageInfo("__1_0.distcp", 1 << 40, 512),
        ours.MetadataIndex("an.object"): ours.StorageInfo("__0_1.distcp", 7, 9),
    }
    read = pickle.loads(ours.dump(ours.Metadata(content, places)))

    expected = real.Metadata(
        {
            "a.weight": real.TensorStorageMetadata(
                real.TensorProperties(dtype=torch.bfloat16),
                torch.Size((4, 6)),
                [
                    real.ChunkStorageMetadata(torch.Size((0, 0)), torch.Size((2, 6))),
                    real.ChunkStorageMetadata(torch.Size((2, 0)), torch.Size((2, 6))),
                ],
            ),
            "an.object": real.BytesStorageMetadata(),
        },
        planner_data=None,
        storage_data={
            real.MetadataIndex("a.weight", torch.Size((0, 0))): _StorageInfo("__0_0.distcp", 0, 512),
            real.MetadataIndex("a.weight", torch.Size((2, 0))): _StorageInfo("__1_0.distcp", 1 << 40, 512),
            real.MetadataIndex("an.object"): _StorageInfo("__0_1.distcp", 7, 9),
        },
    )
    assert read == expected
    assert type(read.state_dict_metadata["a.weight"].chunks[0].sizes) is torch.Size
    again = pickle.loads(pickle.dumps(expected, protocol=2))
    assert read.state_dict_metadata["a.weight"].properties == again.state_dict_metadata["a.weight"].properties
    assert [vars(info) for info in read.storage_data.values()] == [vars(info) for info in again.storage_data.values()]
    assert [vars(index) for index in read.storage_data] == [vars(index) for index in again.storage_data]


def test_a_key_that_looks_like_a_class_is_refused_and_not_changed() -> None:
    odd = f"c{ours.__name__}\nMetadata\n"
    with pytest.raises(ValueError, match="looks like a pickled name"):
        ours.dump(ours.Metadata({odd: ours.BytesStorageMetadata()}, {}))


def test_torchs_checkpoint_package_is_not_imported() -> None:
    line = (
        "import sys, torch; from megagrow.checkpoint import dcp_pickle as o; o.dump(o.Metadata({}, {}));"
        "import megagrow.checkpoint.expand; print('torch.distributed.checkpoint' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", line], check=True, capture_output=True, text=True).stdout == "False\n"
