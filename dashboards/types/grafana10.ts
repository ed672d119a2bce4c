// The same for Grafana 10.4, the oldest version into which the dashboards are imported.
import type * as barchart from "../../node_modules/grafana-schema-10/dist/esm/raw/composable/barchart/panelcfg/x/BarChartPanelCfg_types.gen";
import type * as stat from "../../node_modules/grafana-schema-10/dist/esm/raw/composable/stat/panelcfg/x/StatPanelCfg_types.gen";
import type * as statetimeline from "../../node_modules/grafana-schema-10/dist/esm/raw/composable/statetimeline/panelcfg/x/StateTimelinePanelCfg_types.gen";
import type * as table from "../../node_modules/grafana-schema-10/dist/esm/raw/composable/table/panelcfg/x/TablePanelCfg_types.gen";
import type * as timeseries from "../../node_modules/grafana-schema-10/dist/esm/raw/composable/timeseries/panelcfg/x/TimeSeriesPanelCfg_types.gen";
import type * as trend from "../../node_modules/grafana-schema-10/dist/esm/raw/composable/trend/panelcfg/x/TrendPanelCfg_types.gen";
import type * as xychart from "../../node_modules/grafana-schema-10/dist/esm/raw/composable/xychart/panelcfg/x/XYChartPanelCfg_types.gen";
import type { Dashboard, RowPanel } from "../../node_modules/grafana-schema-10/dist/esm/raw/dashboard/x/dashboard_types.gen";

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
