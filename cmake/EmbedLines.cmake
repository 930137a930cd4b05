# SPDX-License-Identifier: Apache-2.0
# cmake -DINPUTS=a.txt;b.txt -DOUTPUT=x.cpp -P EmbedLines.cmake
# Writes one array of string literals per text file: data travels inside the binary, on every compiler.
set(code "// Generated from native/data by cmake/EmbedLines.cmake.\n#include \"embedded_lines.h\"\n\nnamespace lacuna::embedded {\n")
foreach(input IN LISTS INPUTS)
  get_filename_component(name "${input}" NAME_WE)
  file(STRINGS "${input}" lines ENCODING UTF-8)
  string(APPEND code "static const std::string_view ${name}_lines[] = {\n")
  foreach(line IN LISTS lines)
    string(REPLACE "\\" "\\\\" line "${line}")
    string(REPLACE "\"" "\\\"" line "${line}")
    string(APPEND code "    \"${line}\",\n")
  endforeach()
  string(APPEND code "};\nstd::span<const std::string_view> ${name}() { return ${name}_lines; }\n\n")
endforeach()
string(APPEND code "}  // namespace lacuna::embedded\n")
file(WRITE "${OUTPUT}" "${code}")
