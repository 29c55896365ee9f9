"""Read data sets with the contract's columns, and name file, line and column of a malformed value."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from neurosurgeon.graph.spec import LayerKind
from neurosurgeon.predictor.features import FEATURE_NAMES
from neurosurgeon.predictor.get_datasets_func import COLUMNS, csv_path, load_dataset, read_rows
from neurosurgeon.predictor.places import default_directory
from neurosurgeon.predictor.predictor_utils import SIDES
from neurosurgeon.predictor.store import fit_directory
from neurosurgeon.utils.errors import DataSetError

# The header lines of the contract, letter by letter, and a row of each.
CONTRACT = {
    "conv": ("HW,kernel,stride,Cin,Cout,FLOPs,latency", "{n},3,1,8,16,{n}0000,{n}.5"),
    "dw_conv": ("HW,kernel,stride,Cin,FLOPs,latency", "{n},3,1,8,{n}000,{n}.5"),
    "linear": ("in_features,out_features,FLOPs,latency", "{n}00,10,{n}000,{n}.5"),
    "maxpool": ("HW,kernel,stride,Cin,latency", "{n},2,2,8,{n}.5"),
    "avgpool": ("HW,output,Cin,latency", "{n},1,8,{n}.5"),
    "batchnorm": ("HW,Cin,latency", "{n},8,{n}.5"),
}


@pytest.fixture
def contract_files(tmp_path: Path) -> Path:
    """A directory of files with just the contract's columns."""
    for kind, (header, row) in CONTRACT.items():
        rows = [row.format(n=n) for n in range(10, 30)]
        (tmp_path / f"{kind}_lat.csv").write_text("\n".join([header, *rows]) + "\n")
    return tmp_path


@pytest.mark.parametrize("kind", CONTRACT)
def test_a_file_with_just_the_columns_of_the_contract_loads(contract_files: Path, kind: str) -> None:
    dataset = load_dataset(contract_files, LayerKind(kind))
    assert dataset.features.shape == (20, len(FEATURE_NAMES))
    assert dataset.latency_ms.tolist() == [n + 0.5 for n in range(10, 30)]
    assert ",".join(COLUMNS[LayerKind(kind)]) == CONTRACT[kind][0]


def test_files_with_just_the_columns_of_the_contract_train(contract_files: Path) -> None:
    predictor, scores = fit_directory(contract_files, "linear")
    assert set(predictor.kinds) == {LayerKind(kind) for kind in CONTRACT}
    assert all(score.rows == 3 for score in scores.values())


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("kind", COLUMNS)
def test_the_shipped_data_sets_load(side: str, kind: LayerKind) -> None:
    dataset = load_dataset(default_directory(side, "cpu"), kind)
    assert len(dataset) >= 40
    assert np.isfinite(dataset.features).all()
    header = csv_path(default_directory(side, "cpu"), kind).read_text().splitlines()[0]
    assert header.startswith(",".join(COLUMNS[kind]))


def dataset_error(path: Path, text: str) -> str:
    """Return the error message for a batch-norm file with this text, without the file's path."""
    file = csv_path(path, LayerKind.BATCHNORM)
    file.write_text(text)
    with pytest.raises(DataSetError) as caught:
        load_dataset(path, LayerKind.BATCHNORM)
    message = str(caught.value)
    assert message.startswith(str(file))
    return message.removeprefix(str(file))


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("8,many,1", ", line 3, column 'Cin': 'many' is not a number"),
        ("8,,1", ", line 3, column 'Cin': '' is not a number"),
        ("8,nan,1", ", line 3, column 'Cin': 'nan' is not a sensible number above 0"),
        ("inf,8,1", ", line 3, column 'HW': 'inf' is not a sensible number above 0"),
        ("-8,8,1", ", line 3, column 'HW': '-8' is not a sensible number above 0"),
        ("8,8,0", ", line 3, column 'latency': '0' is not a sensible number above 0"),
        ("8,8,-1", ", line 3, column 'latency': '-1' is not a sensible number above 0"),
        ("8,8", ", line 3, column 'latency': None is not a number"),
        ("8,8,1,5", ", line 3: more values than columns"),
    ],
)
def test_a_malformed_row_is_refused_by_line_and_column(tmp_path: Path, row: str, said: str) -> None:
    assert dataset_error(tmp_path, f"HW,Cin,latency\n8,8,1\n{row}\n").startswith(said)


def test_a_missing_column_is_named_with_those_expected(tmp_path: Path) -> None:
    said = dataset_error(tmp_path, "HW,latency\n8,1\n")
    assert said == ": column 'Cin' is missing; expected HW,Cin,latency"


def test_an_empty_file_misses_its_first_column(tmp_path: Path) -> None:
    assert "'HW' is missing" in dataset_error(tmp_path, "")


def test_a_file_without_rows_is_refused(tmp_path: Path) -> None:
    assert dataset_error(tmp_path, "HW,Cin,latency\n").startswith(" has 0 rows; at least 20 are needed")


def test_a_file_of_few_rows_is_refused(tmp_path: Path) -> None:
    assert dataset_error(tmp_path, "HW,Cin,latency\n" + "8,8,1\n" * 19).startswith(" has 19 rows; at least 20")


def test_rows_of_a_slow_minute_are_scaled_or_left_out(tmp_path: Path) -> None:
    path = tmp_path / "batchnorm_lat.csv"
    path.write_text("HW,Cin,latency,pace_ms\n" + "8,4,1.5,2.0\n" * 6 + "8,4,1.8,2.4\n" * 2 + "8,4,9.0,4.0\n")
    rows = read_rows(path, LayerKind.BATCHNORM)
    assert [row["latency"] for row in rows] == pytest.approx([1.5] * 8)  # the last one met something else


def test_a_column_that_is_there_twice_is_named(tmp_path: Path) -> None:
    said = dataset_error(tmp_path, "HW,Cin,latency,Cin\n" + "8,8,1,8\n" * 30)
    assert said == ": column 'Cin' is there twice"


def test_columns_in_any_order_load(tmp_path: Path) -> None:
    csv_path(tmp_path, LayerKind.BATCHNORM).write_text("latency,Cin,HW\n" + "2.5,3,7\n" * 20)
    assert load_dataset(tmp_path, LayerKind.BATCHNORM).latency_ms.tolist() == [2.5] * 20


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataSetError, match=r"conv_lat\.csv cannot be read"):
        load_dataset(tmp_path, LayerKind.CONV)


def test_a_file_of_bytes_is_refused(tmp_path: Path) -> None:
    csv_path(tmp_path, LayerKind.CONV).write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(DataSetError, match=r"conv_lat\.csv cannot be read"):
        load_dataset(tmp_path, LayerKind.CONV)


def test_a_byte_order_mark_and_spaces_are_ignored(tmp_path: Path) -> None:
    path = csv_path(tmp_path, LayerKind.BATCHNORM)
    path.write_bytes("\ufeffHW, Cin ,latency,min_ms\r\n8,4,1.5,1.0\r\n".encode())
    assert read_rows(path, LayerKind.BATCHNORM) == [{"HW": 8, "Cin": 4, "latency": 1.5, "min_ms": 1.0}]
