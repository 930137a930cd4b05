// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <memory>
#include <string>

#include "lacuna/host.h"
#include "nodes/node_registry.h"

namespace lacuna {

// The built-in ComfyUI node types that workflows around Lacuna use, over an Application, so that
// the same workflow JSON runs headless: CheckpointLoaderSimple, LoraLoaderModelOnly, LoraLoader,
// CLIPTextEncode, EmptyLatentImage, KSampler, VAEDecode, SaveImage, PreviewImage, SaveLoRA
// (SaveLoRANode), PreviewAny. Ids and inputs are ComfyUI's.
// workflow_json is embedded in saved pictures.
void add_host_nodes(NodeRegistry& registry, std::shared_ptr<Application> application,
                    const std::string& workflow_json);

}  // namespace lacuna
