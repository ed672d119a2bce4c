// Grafana's own types of what the dashboards hold; a test turns them into JSON Schemas and checks the files by them.
import type * as barchart from "../../node_modules/@grafana/schema/dist/types/raw/composable/barchart/panelcfg/x/types.gen";
import type * as stat from "../../node_modules/@grafana/schema/dist/types/raw/composable/stat/panelcfg/x/types.gen";
import type * as statetimeline from "../../node_modules/@grafana/schema/dist/types/raw/composable/statetimeline/panelcfg/x/types.gen";
import type * as table from "../../node_modules/@grafana/schema/dist/types/raw/composable/table/panelcfg/x/types.gen";
import type * as timeseries from "../../node_modules/@grafana/schema/dist/types/raw/composable/timeseries/panelcfg/x/types.gen";
import type * as trend from "../../node_modules/@grafana/schema/dist/types/raw/composable/trend/panelcfg/x/types.gen";
import type * as xychart from "../../node_modules/@grafana/schema/dist/types/raw/composable/xychart/panelcfg/x/types.gen";
import type { Dashboard, RowPanel } from "../../node_modules/@grafana/schema/dist/types/raw/dashboard/x/types.gen";

export interface Board extends Dashboard {}
export interface Row extends RowPanel {}
export interface BarchartOptions extends barchart.Options {}
export interface BarchartCustom extends barchart.FieldConfig {}
export interface StatOptions extends stat.Options {}
export interface StateTimelineOptions extends statetimeline.Options {}
export interface StateTimelineCustom extends statetimeline.FieldConfig {}
export interface TableOptions extends table.Options {}
export interface TableCustom extends table.FieldConfig {}
export interface TimeseriesOptions extends timeseries.Options {}
export interface TimeseriesCustom extends timeseries.FieldConfig {}
export interface TrendOptions extends trend.Options {}
export interface TrendCustom extends trend.FieldConfig {}
export interface XychartOptions extends xychart.Options {}
export interface XychartCustom extends xychart.FieldConfig {}
