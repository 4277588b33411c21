"""Cycles of the attention kernel, out of what libtpu writes."""
# ruff: noqa: E501

from pangu_tiny.planning.kernels import Attention, read_bundles


def test_bundles_are_read_by_name(tmp_path):
    for name, text in {
        "1-splash_mha_fwd_residuals.3-88-schedule-analysis_final_bundles.txt": "a\ntotal scheduled bundles:   792\n",
        "2-splash_mha_dq_no_residuals-91-schedule-analysis_final_bundles.txt": "total scheduled bundles: 617",
        "3-fusion.7-92-schedule-analysis_final_bundles.txt": "total scheduled bundles: 5",
        "4-splash_mha_fwd_residuals.3-88-final_bundles.txt": "total scheduled bundles: 1",
    }.items():  # fmt: skip
        (tmp_path / name).write_text(text)
    assert read_bundles(tmp_path) == {
        "splash_mha_fwd_residuals": 792,
        "splash_mha_dq_no_residuals": 617,
    }


def test_blocks_above_the_diagonal_are_skipped():
    whole = Attention("v5e:4x4", 4, 14, 14, 2048, 128, 128)
    assert whole.blocks == 16 * 17 // 2 * 14 * 4
    assert whole._replace(block=2048).blocks == 14 * 4
    assert whole._replace(length=100).blocks == 14 * 4
