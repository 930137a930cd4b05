// SPDX-License-Identifier: Apache-2.0
// The one place where stb is compiled. It only writes: its decoder (stb_image.h) is not used, so
// that no picture can reach it.
#define STBI_WRITE_NO_STDIO
#define STB_IMAGE_WRITE_IMPLEMENTATION
#include <stb_image_write.h>
