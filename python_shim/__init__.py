# SPDX-License-Identifier: Apache-2.0
"""Python side of Lacuna: module loader, hosts, node classes, command line."""
