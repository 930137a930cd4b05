// SPDX-License-Identifier: Apache-2.0
// Puts a graph in API format on the page, in columns from left to right, each a list of node ids
// from top to bottom.
// Nodes 2.0 makes a node with pictures up to 30 higher than it was saved.
const [COLUMN_GAP, ROW_GAP] = [40, 80];
const WIDTH = {
  CheckpointLoaderSimple: 300,
  CLIPTextEncode: 340,
  EmptyLatentImage: 300,
  LacunaConceptSet: 340,
  LacunaAttentionRefine: 340,
  LacunaEvaluateErasure: 460,
  LacunaLoadBundle: 340,
  LacunaLoRAErase: 340,
  LacunaLoRAFuse: 340,
  LacunaSaveBundle: 360,
  KSampler: 290,
  SaveImage: 360,
  LacunaSaveLoRA: 360,
  PreviewAny: 340,
  VAEDecode: 180,
};
const HEIGHT = {
  CLIPTextEncode: 120,
  LacunaAttentionRefine: 480, // room for the report below the widgets
  LacunaConceptSet: 420,
  LacunaEvaluateErasure: 900,
  LacunaLoRAErase: 760,
  LacunaLoRAFuse: 620,
  LacunaSaveBundle: 130,
  LacunaSaveLoRA: 130,
  PreviewAny: 300,
  SaveImage: 270, // low enough that the page shows four small pictures as a square
};

export function arrange(page, api, name, layout, compact = false) {
  return page.evaluate(
    async ({ api, name, layout, width, height, gaps }) => {
      await window.app.loadApiJson(api, name);
      let x = 40;
      for (const column of layout) {
        let y = 60;
        let widest = 0;
        for (const id of column) {
          const node = window.app.graph.nodes.find((node) => String(node.id) === id);
          const [, smallest] = node.computeSize();
          node.setSize([width[node.type] ?? 260, Math.max(smallest, height[node.type] ?? 0)]);
          node.pos = [x, y];
          node.title = api[id]._meta.title;
          y += node.size[1] + gaps[1];
          widest = Math.max(widest, node.size[0]);
        }
        x += widest + gaps[0];
      }
    },
    {
      api,
      name,
      layout,
      width: WIDTH,
      height: compact ? {} : HEIGHT,
      gaps: [COLUMN_GAP, ROW_GAP],
    },
  );
}
