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

/* What the device of each protocol has in common. */
#define TYPE_AEROSTAT_BALLOON_PCI "aerostat-balloon-pci-common"
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
    /* Only the traditional balloon has a PCI ID of the time before virtio 1. */
    if (AEROSTAT_BALLOON_GET_CLASS(&dev->vdev)->kind !=
        AEROSTAT_KIND_VIRTIO_BALLOON) {
        virtio_pci_force_virtio_1(proxy);
    }
    qdev_realize(DEVICE(&dev->vdev), BUS(&proxy->bus), errp);
}

static void aerostat_balloon_pci_class_init(ObjectClass *klass, void *data)
{
    DeviceClass *dc = DEVICE_CLASS(klass);

    VIRTIO_PCI_CLASS(klass)->realize = aerostat_balloon_pci_realize;
    set_bit(DEVICE_CATEGORY_MISC, dc->categories);
    PCI_DEVICE_CLASS(klass)->class_id = PCI_CLASS_OTHERS;
    device_class_set_props(dc, aerostat_balloon_pci_properties);
}

/* The protocol's device, and its properties at the PCI device. */
static void create(Object *obj, const char *type, const char *const *properties)
{
    AerostatBalloonPCI *dev = AEROSTAT_BALLOON_PCI(obj);

    virtio_instance_init_common(obj, &dev->vdev, sizeof(dev->vdev), type);
    for (; *properties; properties++) {
        object_property_add_alias(obj, *properties, OBJECT(&dev->vdev),
                                  *properties);
    }
}

static void virtio_balloon_pci_instance_init(Object *obj)
{
    static const char *const properties[] = {
        "guest-stats", "guest-stats-polling-interval", "counters",
        "balloon-history", "node-ballooned", NULL,
    };

    create(obj, TYPE_AEROSTAT_VIRTIO_BALLOON, properties);
}

static void memballoon_pci_instance_init(Object *obj)
{
    static const char *const properties[] = {
        "counters", "balloon-history", "node-ballooned", "node-targets", NULL,
    };

    create(obj, TYPE_AEROSTAT_MEMBALLOON, properties);
}

static void virtio_balloon_pci_class_init(ObjectClass *klass, void *data)
{
    PCIDeviceClass *pci = PCI_DEVICE_CLASS(klass);

    DEVICE_CLASS(klass)->desc = "virtio balloon served by libaerostat";
    pci->vendor_id = PCI_VENDOR_ID_REDHAT_QUMRANET;
    pci->device_id = PCI_DEVICE_ID_VIRTIO_BALLOON;
    pci->revision = VIRTIO_PCI_ABI_VERSION;
}

static void memballoon_pci_class_init(ObjectClass *klass, void *data)
{
    DEVICE_CLASS(klass)->desc =
        "virtio memory balloon (device ID 13) served by libaerostat";
}

static const TypeInfo aerostat_balloon_pci_info = {
    .name = TYPE_AEROSTAT_BALLOON_PCI,
    .parent = TYPE_VIRTIO_PCI,
    .instance_size = sizeof(AerostatBalloonPCI),
    .abstract = true,
    .class_init = aerostat_balloon_pci_class_init,
};

static const VirtioPCIDeviceTypeInfo virtio_balloon_pci_info = {
    .base_name = "aerostat-balloon-pci-base",
    .generic_name = "aerostat-balloon-pci",
    .transitional_name = "aerostat-balloon-pci-transitional",
    .non_transitional_name = "aerostat-balloon-pci-non-transitional",
    .parent = TYPE_AEROSTAT_BALLOON_PCI,
    .instance_init = virtio_balloon_pci_instance_init,
    .class_init = virtio_balloon_pci_class_init,
};

static const VirtioPCIDeviceTypeInfo memballoon_pci_info = {
    .generic_name = "aerostat-memballoon-pci",
    .parent = TYPE_AEROSTAT_BALLOON_PCI,
    .instance_init = memballoon_pci_instance_init,
    .class_init = memballoon_pci_class_init,
};

static void aerostat_balloon_pci_register(void)
{
    type_register_static(&aerostat_balloon_pci_info);
    virtio_pci_types_register(&virtio_balloon_pci_info);
    virtio_pci_types_register(&memballoon_pci_info);
}

type_init(aerostat_balloon_pci_register)
