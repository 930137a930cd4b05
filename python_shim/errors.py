# SPDX-License-Identifier: Apache-2.0
"""Errors for people: one sentence that says what failed, on what, and what to do."""


class HostError(ValueError):
    """A checkpoint, LoRA, workflow or setting that this host cannot use."""
