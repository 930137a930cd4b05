// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string>

#include "lacuna/files/safetensors_file.h"

namespace lacuna {

// Of every name, shape, byte and metadata entry but "checksum" itself, 16 hexadecimal digits: two
// files that differ in one word never have the same. Against accidents, not against forgery.
// Bundles hold it, so it stays as it is.
std::string checksum_of(const SafetensorsFile& file);

}  // namespace lacuna
