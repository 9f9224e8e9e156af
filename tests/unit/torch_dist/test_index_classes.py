"""An index pickled without torch's classes is the same as one made of torch's classes."""

import pickle
import subprocess
import sys

import pytest
import torch
from torch.distributed.checkpoint import metadata as real
from torch.distributed.checkpoint.filesystem import _StorageInfo

from megagrow.checkpoint.formats.torch_dist import index_classes
from megagrow.checkpoint.index.dtypes import DType


def test_torch_reads_its_own_classes() -> None:
    tensor = index_classes.TensorStorageMetadata(DType.BFLOAT16, (4, 6))
    tensor.chunks += [
        index_classes.ChunkStorageMetadata((0, 0), (2, 6)),
        index_classes.ChunkStorageMetadata((2, 0), (2, 6)),
    ]
    content = {"a.weight": tensor, "an.object": index_classes.BytesStorageMetadata()}
    places = {
        index_classes.MetadataIndex("a.weight", (0, 0)): index_classes.StorageInfo("__0_0.distcp", 0, 512),
        index_classes.MetadataIndex("a.weight", (2, 0)): index_classes.StorageInfo("__1_0.distcp", 1 << 40, 512),
        index_classes.MetadataIndex("an.object"): index_classes.StorageInfo("__0_1.distcp", 7, 9),
    }
    read = pickle.loads(index_classes.dump(index_classes.Metadata(content, places)))

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
    odd = f"c{index_classes.__name__}\nMetadata\n"
    with pytest.raises(ValueError, match="looks like a pickled name"):
        index_classes.dump(index_classes.Metadata({odd: index_classes.BytesStorageMetadata()}, {}))


def test_torchs_checkpoint_package_is_not_imported() -> None:
    line = (
        "import sys, torch; from megagrow.checkpoint.formats.torch_dist import index_classes as o; "
        "o.dump(o.Metadata({}, {}));"
        "import megagrow.convert.run.convert; print('torch.distributed.checkpoint' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", line], check=True, capture_output=True, text=True).stdout == "False\n"
