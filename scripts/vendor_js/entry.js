export { max, min, quantile } from "d3-array";
export { axisBottom, axisLeft } from "d3-axis";
export { sankey, sankeyLinkHorizontal } from "d3-sankey";
export { scaleLinear, scaleLog } from "d3-scale";
export { select } from "d3-selection";
export { line } from "d3-shape";
