/*
 * A virtio balloon whose work is done by libaerostat: on PCI
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "qemu/osdep.h"
#include "qemu/module.h"
#include "hw/qdev-properties.h"
#include "hw/virtio/virtio-pci.h"
#include "aerostat-balloon.h"

#define TYPE_AEROSTAT_BALLOON_PCI "aerostat-balloon-pci-base"
OBJECT_DECLARE_SIMPLE_TYPE(AerostatBalloonPCI, AEROSTAT_BALLOON_PCI)

struct AerostatBalloonPCI {
    VirtIOPCIProxy parent_obj;
    AerostatBalloon vdev;
};

static const Property aerostat_balloon_pci_properties[] = {
    DEFINE_PROP_UINT32("vectors", VirtIOPCIProxy, nvectors,
                       DEV_NVECTORS_UNSPECIFIED),
};

static void aerostat_balloon_pci_realize(VirtIOPCIProxy *proxy, Error **errp)
{
    AerostatBalloonPCI *dev = AEROSTAT_BALLOON_PCI(proxy);

    if (proxy->nvectors == DEV_NVECTORS_UNSPECIFIED) {
        proxy->nvectors = 2;
    }
    proxy->class_code = PCI_CLASS_OTHERS;
    qdev_realize(DEVICE(&dev->vdev), BUS(&proxy->bus), errp);
}

static void aerostat_balloon_pci_class_init(ObjectClass *klass, void *data)
{
    DeviceClass *dc = DEVICE_CLASS(klass);
    PCIDeviceClass *pci = PCI_DEVICE_CLASS(klass);

    VIRTIO_PCI_CLASS(klass)->realize = aerostat_balloon_pci_realize;
    dc->desc = "virtio balloon served by libaerostat";
    set_bit(DEVICE_CATEGORY_MISC, dc->categories);
    pci->vendor_id = PCI_VENDOR_ID_REDHAT_QUMRANET;
    pci->device_id = PCI_DEVICE_ID_VIRTIO_BALLOON;
    pci->revision = VIRTIO_PCI_ABI_VERSION;
    pci->class_id = PCI_CLASS_OTHERS;
    device_class_set_props(dc, aerostat_balloon_pci_properties);
}

static void aerostat_balloon_pci_instance_init(Object *obj)
{
    static const char *const of_device[] = {
        "guest-stats", "guest-stats-polling-interval", "counters",
        "balloon-history",
    };
    AerostatBalloonPCI *dev = AEROSTAT_BALLOON_PCI(obj);
    int i;

    virtio_instance_init_common(obj, &dev->vdev, sizeof(dev->vdev),
                                TYPE_AEROSTAT_BALLOON);
    for (i = 0; i < ARRAY_SIZE(of_device); i++) {
        object_property_add_alias(obj, of_device[i], OBJECT(&dev->vdev),
                                  of_device[i]);
    }
}

static const VirtioPCIDeviceTypeInfo aerostat_balloon_pci_info = {
    .base_name = TYPE_AEROSTAT_BALLOON_PCI,
    .generic_name = "aerostat-balloon-pci",
    .transitional_name = "aerostat-balloon-pci-transitional",
    .non_transitional_name = "aerostat-balloon-pci-non-transitional",
    .instance_size = sizeof(AerostatBalloonPCI),
    .instance_init = aerostat_balloon_pci_instance_init,
    .class_init = aerostat_balloon_pci_class_init,
};

static void aerostat_balloon_pci_register(void)
{
    virtio_pci_types_register(&aerostat_balloon_pci_info);
}

type_init(aerostat_balloon_pci_register)
