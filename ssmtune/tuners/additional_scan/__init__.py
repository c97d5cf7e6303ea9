"""Additional-scan."""

from ssmtune.tuners.additional_scan.config import AdditionalScanConfig
from ssmtune.tuners.additional_scan.layer import AdditionalScanLayer
from ssmtune.tuners.additional_scan.model import AdditionalScanModel

__all__ = ["AdditionalScanConfig", "AdditionalScanLayer", "AdditionalScanModel"]
