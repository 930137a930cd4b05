#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Installs what the build needs from Debian's packages, where it is missing and this user may.
# Elsewhere it says what to install.
python=$1
missing=""
command -v c++ >/dev/null 2>&1 || missing="$missing g++"
[ -e /usr/include/gtest/gtest.h ] || [ -e /usr/local/include/gtest/gtest.h ] || missing="$missing libgtest-dev"
"$python" -c 'import ensurepip, venv' 2>/dev/null || missing="$missing python3-venv"
"$python" -c 'import os, sysconfig; os.stat(os.path.join(sysconfig.get_path("include"), "Python.h"))' 2>/dev/null ||
  missing="$missing python3-dev"
# Only the page test wants a browser, and only when there is a ComfyUI to open.
if [ -f "$COMFYUI_DIR/main.py" ] && command -v npm >/dev/null 2>&1; then
  command -v chromium >/dev/null 2>&1 || missing="$missing chromium"
fi
[ -n "$missing" ] || exit 0
if command -v apt-get >/dev/null 2>&1 && [ "$(id -u)" = 0 ]; then
  echo "installing:$missing"
  apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq $missing >/dev/null
else
  echo "please install:$missing (Debian and Ubuntu: sudo apt install$missing)" >&2
  exit 1
fi
