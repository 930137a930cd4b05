// SPDX-License-Identifier: Apache-2.0
// A graph keeps what it did when it was saved: a widget that is newer than the graph takes the value
// that stands for how things were before, instead of the default of new nodes.
import { app } from "../../scripts/app.js";

app.registerExtension({
  name: "lacuna.savedGraphs",
  beforeRegisterNodeDef(nodeType, nodeData) {
    if (!nodeData.name.startsWith("Lacuna")) return;
    const inputs = { ...nodeData.input?.required, ...nodeData.input?.optional };
    const newer = Object.entries(inputs).filter(([, spec]) => spec[1]?.saved !== undefined);
    if (newer.length === 0) return;
    const before = nodeType.prototype.onConfigure;
    nodeType.prototype.onConfigure = function (info) {
      before?.apply(this, arguments);
      const count = info?.widgets_values?.length;
      if (count === undefined) return;
      for (const [name, spec] of newer) {
        const place = this.widgets?.findIndex((widget) => widget.name === name) ?? -1;
        if (place >= count) this.widgets[place].value = spec[1].saved;
      }
    };
  },
});
