// SPDX-License-Identifier: Apache-2.0
// Registers the extension module; no logic of its own beyond conversion.
#include <ATen/core/grad_mode.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include <set>
#include <tuple>

#include "lacuna/error.h"
#include "lacuna/evaluation/confidence.h"
#include "lacuna/evaluation/evaluation_report.h"
#include "lacuna/files/image_file.h"
#include "nodes/graph_runner.h"
#include "nodes/host_nodes.h"
#include "nodes/node_registry.h"
#include "plugin/python_host.h"
#include "plugin/python_values.h"

namespace lacuna {
namespace py = pybind11;
namespace {

// The node types and their caches, one object per host process. Nodes run without the GIL, so that
// several threads may be in here at once: see KeptState.
class NodePack {
 public:
  NodePack(const std::string& output_folder, const std::string& input_folder)
      : registry_(NodeRegistry::with_lacuna_nodes(output_folder, input_folder)) {}

  std::string schemas() const { return to_json(registry_.schemas()); }

  void validate(const std::string& id, const py::dict& constants) const {
    const Node& node = registry_.at(id);
    node.validate(read_constants(node.schema(), constants));
  }

  std::string outside_state(const std::string& id, const py::dict& constants) const {
    const Node& node = registry_.at(id);
    return node.outside_state(read_constants(node.schema(), constants));
  }

  py::list run(const std::string& id, const py::dict& values, py::object host_progress,
               const WidgetTexts& widgets) {
    Node& node = registry_.at(id);
    const NodeInputs inputs = read_inputs(node.schema(), values, {}, widgets);
    const std::shared_ptr<Progress> progress = wrap_progress(std::move(host_progress));
    NodeResult result;
    {
      py::gil_scoped_release release;
      const at::NoGradGuard no_grad;
      result = node.run(inputs, *progress);
    }
    py::list outputs;
    for (const Value& value : result.outputs) outputs.append(to_python(value));
    return outputs;
  }

  static py::dict run_workflow(const std::string& workflow_json, py::object host,
                               py::object host_progress) {
    const std::shared_ptr<Progress> progress = wrap_progress(std::move(host_progress));
    const std::shared_ptr<Application> application = wrap_application(std::move(host));
    std::vector<WorkflowOutput> outputs;
    {
      py::gil_scoped_release release;
      const at::NoGradGuard no_grad;
      const Workflow workflow = parse_workflow(workflow_json);
      NodeRegistry registry = NodeRegistry::with_lacuna_nodes(application->output_directory());
      add_host_nodes(registry, application, workflow_json);
      outputs = lacuna::run_workflow(workflow, registry, *progress);
    }
    py::dict result;
    for (const WorkflowOutput& output : outputs) {
      py::dict entry;
      entry["images"] = output.result.images;
      entry["files"] = output.result.files;
      entry["text"] = output.result.text;
      result[py::str(output.node)] = entry;
    }
    return result;
  }

 private:
  static NodeInputs read_constants(const NodeSchema& schema, const py::dict& constants) {
    std::set<std::string> linked;  // what is not constant comes through a link
    for (const InputSpec& input : schema.inputs) {
      if (!constants.contains(input.id)) linked.insert(input.id);
    }
    return read_inputs(schema, constants, linked);
  }

  static NodeInputs read_inputs(const NodeSchema& schema, const py::dict& values,
                                const std::set<std::string>& linked = {},
                                const WidgetTexts& widgets = {}) {
    std::map<std::string, Value> inputs;
    for (const auto& [key, object] : values) {
      const auto id = key.cast<std::string>();
      if (object.is_none()) continue;
      const InputSpec* input = find_input(schema, id);
      if (input == nullptr) throw Error(schema.display_name + ": unknown input '" + id + "'");
      inputs[id] = to_value(*input, object);
    }
    fill_in_widgets(schema, inputs, widgets);
    return NodeInputs(schema, std::move(inputs), linked);
  }

  NodeRegistry registry_;
};

// What scripts and the command line need of an evaluation besides its node.
void register_evaluation(py::module_& module) {
  module.def(
      "wilson_interval",
      [](int64_t hits, int64_t trials) {
        const Interval interval = wilson_interval({hits, trials});
        return std::pair(interval.low, interval.high);
      },
      py::arg("hits"), py::arg("trials"), "95 % interval of a proportion.");
  module.def("exact_mcnemar", &exact_mcnemar, py::arg("only_before"), py::arg("only_after"),
             "Two-sided p of pairs in which only one of the two says yes.");
  module.def(
      "clustered_bootstrap",
      [](const std::vector<double>& values, const std::vector<int64_t>& clusters, int64_t seed,
         const std::string& subject) {
        if (values.size() != clusters.size()) throw Error("every value needs its cluster");
        const MeanEstimate found = clustered_bootstrap(values, clusters, seed, subject);
        return std::tuple(found.mean, found.interval.low, found.interval.high);
      },
      py::arg("values"), py::arg("clusters"), py::arg("seed") = 0, py::arg("subject") = "",
      "Mean of the values and its 95 % interval, resampling whole clusters.");
  module.def("holm", &holm, py::arg("p"), "p-values corrected for their number.");
  module.def(
      "save_png", [](const at::Tensor& image, const std::string& path) { save_png(image, path); },
      py::arg("image"), py::arg("path"), "Writes [height, width, 3] in 0..1.");
  module.def(
      "evaluation_html",
      [](const std::string& report, const std::vector<py::bytes>& pages) {
        return to_html(report, {pages.begin(), pages.end()});
      },
      py::arg("report"), py::arg("pages"),
      "The report of Evaluate Erasure and its sheet (PNG files' bytes) as one page of HTML.");
}

}  // namespace
}  // namespace lacuna

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  namespace py = pybind11;
  using namespace lacuna;
  module.doc() = "Lacuna's native core for torch " LACUNA_TORCH_VERSION;
  module.attr("__version__") = LACUNA_VERSION;
  module.attr("host_interface") = kHostInterface;
  module.attr("torch_version") = LACUNA_TORCH_VERSION;
  py::register_local_exception<Error>(module, "LacunaError", PyExc_ValueError);

  py::class_<ConceptSetRef>(module, "ConceptSet", py::module_local(),
                            "Concepts to forget and to preserve (LACUNA_CONCEPTS).");
  py::class_<RefinementRef>(module, "Refinement", py::module_local(),
                            "A closed-form edit (LACUNA_REFINEMENT).");
  py::class_<LoraBundleRef>(module, "LoraBundle", py::module_local(),
                            "Trained concepts (LACUNA_LORAS).");
  register_attention_tap(module);
  register_evaluation(module);
  py::class_<NodePack>(module, "NodePack", py::module_local(), "The node types and their caches.")
      .def(py::init<const std::string&, const std::string&>(), py::arg("output_folder") = "output",
           py::arg("input_folder") = "input")
      .def("schemas", &NodePack::schemas, "JSON list of node schemas.")
      .def("validate", &NodePack::validate, py::arg("node_id"), py::arg("constants"),
           "Checks widget values; raises LacunaError.")
      .def("outside_state", &NodePack::outside_state, py::arg("node_id"), py::arg("constants"),
           "What the result depends on besides inputs, e.g. the date of a file.")
      .def("run", &NodePack::run, py::arg("node_id"), py::arg("inputs"),
           py::arg("progress") = py::none(), py::arg("widgets") = WidgetTexts(),
           "Runs one node; returns its outputs in schema order. widgets: values by 'Node.widget', "
           "for names of files.")
      .def_static("run_workflow", &NodePack::run_workflow, py::arg("workflow_json"),
                  py::arg("host"), py::arg("progress") = py::none(),
                  "Runs an API-format workflow headless; returns files and text by node id.");
}
