// On which chart the limit of a rule is drawn. Generated from the rules: python -m tests.diagnosis.rule_documents

/**
 * Rule -> the statistics that it may have judged; the evidence of an alert tells which of them it was. Where of_rms is
 * true, the limit is of a root mean square: the norm's limit is that times the root of the number of elements.
 * @type {Record<string, {evidence: string, statistic: string, of_rms: boolean}[]>}
 */
export const CHART_LIMITS = {
  "exploding": [
    {
      "evidence": "median_ratio",
      "statistic": "ratio",
      "of_rms": false
    },
    {
      "evidence": "amplification_decades",
      "statistic": "ratio",
      "of_rms": false
    }
  ],
  "throttled": [
    {
      "evidence": "clipped_unit_share",
      "statistic": "clipped_unit_share",
      "of_rms": false
    }
  ],
  "vanishing": [
    {
      "evidence": "attenuation_decades",
      "statistic": "grad_norm",
      "of_rms": true
    }
  ]
};
