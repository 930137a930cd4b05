# SPDX-License-Identifier: Apache-2.0
"""Python side of Lacuna: the loader of the native module, the hosts, the node classes, the command line."""
