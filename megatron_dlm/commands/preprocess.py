"""`megatron-dlm preprocess`: training data as token ids, indexed on the disk."""

from __future__ import annotations

import os

from megatron_dlm.commands.common import quiet_libraries
from megatron_dlm.config.flags import parse
from megatron_dlm.config.log import ReportConfig
from megatron_dlm.config.sections import pick_parts
from megatron_dlm.config.validate import check_files
from megatron_dlm.config.validate_preprocess import check_preprocess
from megatron_dlm.platform import te

SECTIONS = ("tokenizer", "preprocess")


def main(argv: list[str]) -> None:
    config = parse("preprocess", pick_parts(*SECTIONS), argv)
    settings, words = config["preprocess"], config["tokenizer"]
    check_preprocess(settings, words, os.environ)
    check_files(config)
    quiet_libraries()
    te.shield()  # megatron-core writes the files; there is no device to prepare
    from megatron_dlm.data.preprocess import preprocess
    from megatron_dlm.training.report import Report

    with Report(ReportConfig(progress_bar=settings.progress_bar), True, {}) as report:
        report.say(preprocess(settings, words, report.bar))
